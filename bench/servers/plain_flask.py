"""The article's loop in Flask, with the SDK's own objects."""

from collections.abc import Iterator

import httpx2
import openai
from flask import Flask, Response, request, stream_with_context

app = Flask(__name__)
# With its default of 1,000 connections the SDK would let half of 2,000 callers wait.
client = openai.OpenAI(max_retries=0, http_client=openai.DefaultHttpx2Client(limits=httpx2.Limits()))


@app.post("/api/get-response")
def get_response() -> Response:
    message = request.get_json()["message"]

    def pieces() -> Iterator[str]:
        completion = client.chat.completions.create(
            model="gpt-4.1-mini", messages=[{"role": "user", "content": message}], stream=True
        )
        for chunk in completion:
            yield chunk.choices[0].delta.content or ""

    return Response(stream_with_context(pieces()), content_type="text/plain; charset=utf-8")
