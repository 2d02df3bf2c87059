// Lines of JSON in, lines of JSON out: {"id", "job", ...} -> {"id", ...what the client's user sees}.
// One process for all tests: to load three AI SDKs takes longer than most of the jobs.

import { createInterface } from "node:readline";
import * as aiSdk from "./ai_sdk.mjs";
import * as openai from "./openai.mjs";
import * as parser from "./parser.mjs";
import * as webhooks from "./webhooks.mjs";

const JOBS = { ...aiSdk, ...openai, ...parser, ...webhooks };
const SECONDS = 30;

function late() {
  return new Promise((_, reject) => {
    setTimeout(() => reject(new Error(`the job took more than ${SECONDS} s`)), SECONDS * 1000).unref();
  });
}

async function run({ id, job, ...options }) {
  try {
    return { id, seen: await Promise.race([JOBS[job](options), late()]) };
  } catch (error) {
    return { id, failed: error?.stack ?? String(error) };
  }
}

// What nobody awaits must not end the process: a browser goes on as well. The test is told.
const unhandled = [];
process.on("unhandledRejection", (error) => unhandled.push(String(error?.stack ?? error)));

for await (const line of createInterface({ input: process.stdin })) {
  run(JSON.parse(line)).then((result) => {
    const told = { ...result, unhandled: unhandled.splice(0) };
    process.stdout.write(`${JSON.stringify(told)}\n`);
  });
}
