"""streamchat: answers of OpenAI-compatible models, streamed by Flask applications while they are being written."""

from .errors import SettingsError, StreamChatError
from .extension import StreamChat
from .ledger import Record, answer_finished, answer_started
from .schema import ChatRequest, Message
from .scraping import metrics_view
from .settings import Settings
from .views import create_blueprint

__all__ = [
    "ChatRequest",
    "Message",
    "Record",
    "Settings",
    "SettingsError",
    "StreamChat",
    "StreamChatError",
    "answer_finished",
    "answer_started",
    "create_blueprint",
    "metrics_view",
]
