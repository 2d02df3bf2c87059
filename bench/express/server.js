// The article's server: Express and openai-node, each delta written as it comes.
// Its last write, of a variable that the article never sets, is left out.
import express from "express";
import OpenAI from "openai";

const openai = new OpenAI({ maxRetries: 0 });
const app = express();

app.post("/api/get-response", express.json(), async (req, res) => {
  res.writeHead(200, { "Content-Type": "text/plain; charset=utf-8" });
  const completion = await openai.chat.completions.create({
    model: "gpt-4.1-mini",
    stream: true,
    messages: [{ role: "user", content: req.body.message }],
  });
  for await (const chunk of completion) {
    const [choice] = chunk.choices;
    const { content } = choice.delta;
    const finalContent = content ? content : "";
    res.write(finalContent);
  }
  res.end();
});

// The default backlog, 511, would refuse some of 2,000 callers.
app.listen({ port: Number(process.env.PORT), host: "127.0.0.1", backlog: 4096 });
