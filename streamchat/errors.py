"""Everything that can go wrong, as the caller is told it: status, code, whether a retry helps, public text.

No error here carries the words of the upstream: keys and organisation ids hide in them.

    StreamChatError
    |-- SettingsError              stops the start, is never an HTTP answer
    |-- Refused                    our own checks
    |   |-- InvalidRequest         400 invalid_request
    |   |-- Unauthorized           401 unauthorized
    |   |-- Forbidden              403 forbidden
    |   |-- NotFound               404 not_found
    |   |-- NotAcceptable          406 not_acceptable
    |   |-- PayloadTooLarge        413 payload_too_large
    |   |-- UnsupportedMediaType   415 unsupported_media_type
    |   |-- IdempotencyMismatch    422 idempotency_mismatch
    |   |-- TooManyStreams         429 too_many_streams
    |   `-- BudgetExhausted        429 budget_exhausted
    |-- Overloaded                 503 overloaded
    |   `-- StoreDown              503 overloaded (the response log does not answer)
    |-- Draining                   503 draining
    |-- Interrupted                500 interrupted (in a stream: its producer died)
    |   `-- LeaseLost              500 interrupted (this process was taken for dead)
    |-- Gap                        500 gap (in a stream: the log is not complete)
    |-- Cancelled                  409 cancelled (in a stream: somebody stopped it)
    |-- CallerGone                 499 caller_left (nobody is there to read it)
    |   `-- CallerStalled          499 caller_stalled
    `-- UpstreamFailure            what the model's side did
        |-- InputTooLong           413 input_too_long
        |-- ContentRefused         422 refused
        |-- UpstreamRateLimited    503 upstream_rate_limited
        |-- UpstreamQuota          503 upstream_quota
        |-- UpstreamAuth           502 upstream_auth
        |-- UpstreamRejected       502 upstream_rejected
        |-- UpstreamError          502 upstream_error
        |-- UpstreamUnreachable    502 upstream_unreachable
        |-- UpstreamMalformed      502 upstream_malformed
        |-- UpstreamIncomplete     502 upstream_incomplete
        |-- UpstreamTimeout        504 upstream_timeout
        `-- UpstreamStalled        504 upstream_stalled
"""

from __future__ import annotations

from http import HTTPStatus


class StreamChatError(Exception):
    """The base; `detail` is public text and never holds what the caller or the upstream sent."""

    status: int = 500
    code: str = "interrupted"
    retryable: bool = False
    text: str = "The answer could not be made."
    soon: int | None = None  # seconds: Retry-After, where nobody knows better

    def __init__(self, detail: str | None = None, *, retry_after: int | None = None) -> None:
        self.detail = detail or self.text
        self.retry_after = self.soon if retry_after is None else retry_after
        super().__init__(self.detail)

    @property
    def title(self) -> str:
        """The status in words, as RFC 9457 wants it where `type` is about:blank."""
        return TITLES.get(self.status) or HTTPStatus(self.status).phrase


TITLES = {499: "Client Closed Request"}  # nginx's number; http.HTTPStatus does not know it


class SettingsError(StreamChatError):
    """A setting that cannot be used; the text names key, value and cure."""


class Refused(StreamChatError):
    """The request itself is at fault; nothing was sent upstream."""

    status = 400


class InvalidRequest(Refused):
    code = "invalid_request"
    text = "The request cannot be understood."


class Unauthorized(Refused):
    status = 401
    code = "unauthorized"
    text = "A valid token is needed: send the header 'Authorization: Bearer <token>'."


class Forbidden(Refused):
    status = 403
    code = "forbidden"
    text = "This caller may not do this."


class NotFound(Refused):
    status = 404
    code = "not_found"
    text = "There is nothing here."


class NotAcceptable(Refused):
    status = 406
    code = "not_acceptable"
    text = "The header Accept names no format that can be written."


class PayloadTooLarge(Refused):
    status = 413
    code = "payload_too_large"
    text = "The request is too large."


class UnsupportedMediaType(Refused):
    status = 415
    code = "unsupported_media_type"
    text = "The body must be JSON: send the header 'Content-Type: application/json'."


class IdempotencyMismatch(Refused):
    status = 422
    code = "idempotency_mismatch"
    text = "This Idempotency-Key was used with another request. Send a new key."


class TooManyStreams(Refused):
    status = 429
    code = "too_many_streams"
    retryable = True
    text = "Too many answers are running for this caller."


class BudgetExhausted(Refused):
    """The user's tokens of the day are spent, or held by answers that still run."""

    status = 429
    code = "budget_exhausted"
    retryable = True
    text = "The tokens of this day are used up."


class Overloaded(StreamChatError):
    """This worker holds as many answers as it may."""

    status = 503
    code = "overloaded"
    retryable = True
    text = "Too many answers are running here. Try again soon."


class StoreDown(Overloaded):
    """The response log does not answer, or is busy for too long."""

    text = "The response log does not answer. Try again soon."
    soon = 2


class Draining(StreamChatError):
    """This worker is stopping."""

    status = 503
    code = "draining"
    retryable = True
    text = "The server is restarting. Try again."


class Interrupted(StreamChatError):
    """What made the answer died: a bug, or a killed greenlet."""

    code = "interrupted"
    retryable = True
    text = "The answer was interrupted."


class LeaseLost(Interrupted):
    """This process did not renew its lease in time: others have ended its answers."""


class Gap(StreamChatError):
    """Events are missing in the log. They are not skipped."""

    code = "gap"
    retryable = True
    text = "A part of the answer is missing."


class Cancelled(StreamChatError):
    """Somebody who may do so stopped the answer."""

    status = 409
    code = "cancelled"
    text = "The answer was stopped."


class CallerGone(StreamChatError):
    """The caller left before the end. 499 is nginx's status for it; nobody reads it."""

    status = 499
    code = "caller_left"
    text = "The caller left."


class CallerStalled(CallerGone):
    code = "caller_stalled"
    text = "The caller stopped reading."


class UpstreamFailure(StreamChatError):
    """The model's side failed."""

    status = 502
    code = "upstream_error"
    text = "The model could not be asked."


class InputTooLong(UpstreamFailure):
    status = 413
    code = "input_too_long"
    text = "The conversation is too long for the model."


class ContentRefused(UpstreamFailure):
    status = 422
    code = "refused"
    text = "The model's provider refuses this request."


class UpstreamRateLimited(UpstreamFailure):
    status = 503
    code = "upstream_rate_limited"
    retryable = True
    text = "The model is asked too often at the moment. Try again later."


class UpstreamQuota(UpstreamFailure):
    status = 503
    code = "upstream_quota"
    text = "The model's quota is used up."


class UpstreamAuth(UpstreamFailure):
    code = "upstream_auth"
    text = "The model's provider does not accept this server's key."


class UpstreamRejected(UpstreamFailure):
    code = "upstream_rejected"
    text = "The model's provider rejected the request."


class UpstreamError(UpstreamFailure):
    retryable = True
    text = "The model's provider failed."


class UpstreamUnreachable(UpstreamFailure):
    code = "upstream_unreachable"
    retryable = True
    text = "The model's provider cannot be reached."


class UpstreamMalformed(UpstreamFailure):
    code = "upstream_malformed"
    retryable = True
    text = "The model's provider sent something that is not an answer."


class UpstreamIncomplete(UpstreamFailure):
    code = "upstream_incomplete"
    retryable = True
    text = "The answer was cut off."


class UpstreamTimeout(UpstreamFailure):
    status = 504
    code = "upstream_timeout"
    retryable = True
    text = "The model took too long."


class UpstreamStalled(UpstreamFailure):
    status = 504
    code = "upstream_stalled"
    retryable = True
    text = "The model stopped in the middle of the answer."
