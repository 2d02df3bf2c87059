// eventsource-parser: the events of a stream, however its text is split, and what it holds against it.

import { createParser } from "eventsource-parser";

function parse(pieces) {
  const seen = { events: [], comments: [], errors: [] };
  const parser = createParser({
    onEvent: ({ event = null, data, id = null }) => seen.events.push({ event, id, data: readable(data) }),
    onComment: (comment) => seen.comments.push(comment),
    onError: (error) => seen.errors.push(String(error)),
    onRetry: (retry) => seen.errors.push(`retry ${retry}`),
  });
  for (const piece of pieces) parser.feed(piece);
  return seen;
}

function readable(data) {
  return data === "[DONE]" ? data : JSON.parse(data);
}

export async function parsed({ url, body, headers }) {
  const asked = { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body: JSON.stringify(body) };
  const response = await fetch(url, asked);
  const text = await response.text();
  const [whole, split] = [parse([text]), parse([...text])];
  return { status: response.status, ...whole, same: JSON.stringify(whole) === JSON.stringify(split) };
}
