"""The article's loop in FastAPI, with the SDK's asynchronous client."""

from collections.abc import AsyncIterator

import httpx2
import openai
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

app = FastAPI()
# With its default of 1,000 connections the SDK would let half of 2,000 callers wait.
client = openai.AsyncOpenAI(max_retries=0, http_client=openai.DefaultAsyncHttpx2Client(limits=httpx2.Limits()))


class Question(BaseModel):
    message: str


@app.post("/api/get-response")
async def get_response(question: Question) -> StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        completion = await client.chat.completions.create(
            model="gpt-4.1-mini", messages=[{"role": "user", "content": question.message}], stream=True
        )
        async for chunk in completion:
            yield chunk.choices[0].delta.content or ""

    return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")
