"""The ways in: a blueprint, StreamChat(app), a factory; more than once, nested, beside what a shop has already."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Blueprint, Flask, abort, g, url_for
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

from streamchat import SettingsError, StreamChat, create_blueprint
from streamchat.extension import follow_worker, mounts_of
from tests.fake_upstream import FakeUpstream, RecordedRequest, Step, answer
from tests.shop import KEY, SSE, Shop, events_of, open_shop


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    def echo(asked: RecordedRequest) -> Step:
        return answer([f"{asked.body['model']}: {asked.message}"])

    with FakeUpstream() as server:
        server.choose = echo
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def said(shop: Shop, url: str = "/api/get-response") -> bytes:
    response = shop.ask(url=url)
    assert response.status_code == 200, response.data
    return bytes(response.data)


def by_blueprint(app: Flask) -> None:
    app.register_blueprint(create_blueprint(authorize=lambda _: "ann"), url_prefix="/api")


def by_extension(app: Flask) -> None:
    StreamChat(app, authorize=lambda _: "ann")


def by_factory(app: Flask) -> None:
    chat = StreamChat(authorize=lambda _: "nobody")
    chat.init_app(app, authorize=lambda _: "ann")


def by_config(app: Flask) -> None:
    app.config["STREAMCHAT_PUBLIC"] = True
    StreamChat().init_app(app)


@pytest.mark.parametrize(
    ("build", "user"), [(by_blueprint, "ann"), (by_extension, "ann"), (by_factory, "ann"), (by_config, None)]
)
def test_each_way_in_answers(build: Callable[[Flask], None], user: str | None, upstream: FakeUpstream) -> None:
    with open_shop(build) as shop:
        assert said(shop) == b"gpt-4.1-mini: hi"
        assert shop.the_record().user == user
        assert list(shop.app.extensions["streamchat"]) == ["streamchat"]


@pytest.mark.parametrize("prefix", [None, "/", "/v2/chat", "/<tenant>/chat"])
def test_any_prefix_will_do(prefix: str | None, upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        if prefix and "<" in prefix:
            app.url_value_preprocessor(lambda _, values: values.pop("tenant", None) and None if values else None)
        app.register_blueprint(create_blueprint(public=True), url_prefix=prefix)

    with open_shop(build) as shop:
        path = (prefix or "").rstrip("/").replace("<tenant>", "acme")
        assert said(shop, f"{path}/get-response") == b"gpt-4.1-mini: hi"


def test_two_mounts_in_one_app_have_settings_slots_and_hooks_of_their_own(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        app.config["STREAMCHAT_MODEL"] = "common"
        one = create_blueprint("one", model="m1", authorize=lambda _: "ann", max_streams=1)
        two = create_blueprint("two", tokens={"bob": "t"}, make_id=lambda: "two-1")
        app.register_blueprint(one, url_prefix="/one")
        app.register_blueprint(two, url_prefix="/two")

    with open_shop(build) as shop:
        assert said(shop, "/one/get-response") == b"m1: hi"
        assert shop.ask(url="/two/get-response").status_code == 401
        response = shop.ask(url="/two/get-response", headers={"Authorization": "Bearer t"})
        assert response.data == b"common: hi"
        assert response.headers["X-Response-Id"] == "two-1"
        assert [record.user for record in shop.wait_records(2)] == ["ann", "bob"]
        assert list(shop.app.extensions["streamchat"]) == ["one", "two"]
        one, two = shop.mounts
        assert one.process.live is not two.process.live
        assert one.process.live.most == 1


def test_one_blueprint_registered_twice_under_two_names(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        blueprint = create_blueprint(public=True)
        app.register_blueprint(blueprint, url_prefix="/a")
        app.register_blueprint(blueprint, url_prefix="/b", name="again")

    with open_shop(build) as shop:
        assert said(shop, "/a/get-response") == said(shop, "/b/get-response")
        assert list(shop.app.extensions["streamchat"]) == ["streamchat", "again"]


def test_the_extension_twice_in_one_app(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        StreamChat(app, public=True, model="m1")
        StreamChat(app, public=True, model="m2", name="second", url_prefix="/second")

    with open_shop(build) as shop:
        assert said(shop) == b"m1: hi"
        assert said(shop, "/second/get-response") == b"m2: hi"


def test_one_extension_in_two_apps_shares_nothing(upstream: FakeUpstream) -> None:
    chat = StreamChat(public=True)

    def build(model: str) -> Callable[[Flask], None]:
        def mount(app: Flask) -> None:
            app.config["STREAMCHAT_MODEL"] = model
            chat.init_app(app)

        return mount

    with open_shop(build("m1")) as one, open_shop(build("m2")) as two:
        assert (said(one), said(two)) == (b"m1: hi", b"m2: hi")
        assert (len(one.records), len(two.records)) == (1, 1)
        assert one.mounts[0].process is not two.mounts[0].process
        assert not [value for value in vars(chat).values() if isinstance(value, Flask)]


def test_nested_in_a_blueprint_of_the_shop(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        outer = Blueprint("outer", __name__, url_prefix="/outer")
        outer.before_request(lambda: setattr(g, "outer", "seen"))
        outer.register_blueprint(create_blueprint(authorize=lambda _: g.outer), url_prefix="/inner")
        app.register_blueprint(outer)

    with open_shop(build) as shop:
        response = shop.ask(url="/outer/inner/get-response", accept=SSE)
        assert events_of(SSE, response.data)[1]["text"] == "gpt-4.1-mini: hi"
        assert shop.the_record().user == "seen"
        assert list(shop.app.extensions["streamchat"]) == ["outer.streamchat"]
        assert shop.app.test_client().get("/outer/inner/healthz").status_code == 200


def test_views_have_endpoints_that_can_be_named(upstream: FakeUpstream) -> None:
    with open_shop() as shop, shop.app.test_request_context():
        assert url_for("streamchat.get_response") == "/api/get-response"


def test_the_shops_own_routes_and_pages_stay_its_own(upstream: FakeUpstream) -> None:
    seen: list[str] = []

    def build(app: Flask) -> None:
        app.add_url_rule("/", "home", lambda: "welcome")
        app.add_url_rule("/api/products", "products", lambda: {"products": []})
        app.add_url_rule("/broken", "broken", lambda: abort(429))
        app.register_error_handler(404, lambda _: ("our own 404", 404))
        app.register_error_handler(429, lambda _: ("our own 429", 429))
        app.register_error_handler(Exception, lambda error: (f"our own {type(error).__name__}", 500))
        app.before_request(lambda: seen.append("before"))

        @app.after_request
        def mark(response: Any) -> Any:
            response.headers["X-Shop"] = "yes"
            return response

        StreamChat(app, public=True)

    with open_shop(build) as shop:
        client = shop.app.test_client()
        home = client.get("/")
        assert (home.data, "X-Response-Id" in home.headers) == (b"welcome", False)
        assert client.get("/api/products").json == {"products": []}
        assert client.get("/api/nothing").data == b"our own 404"
        assert client.get("/broken").data == b"our own 429"
        assert client.post("/").data == b"our own MethodNotAllowed"
        assert client.get("/api/get-response").data == b"our own MethodNotAllowed"
        response = shop.ask()
        assert (response.data, response.headers["X-Shop"]) == (b"gpt-4.1-mini: hi", "yes")
        assert len(seen) == 7


def test_what_runs_before_every_request_may_refuse(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        shop.app.before_request(lambda: ("closed", 503))
        response = shop.ask()
        assert (response.status_code, response.data) == (503, b"closed")
        assert response.headers["X-Response-Id"]
        assert upstream.connections == 0


def test_a_bad_setting_stops_init_app(upstream: FakeUpstream) -> None:
    app = Flask("shop")
    app.config["STREAMCHAT_IDLE_TIMEOUT"] = "soon"
    with pytest.raises(SettingsError, match="STREAMCHAT_IDLE_TIMEOUT must be a number of seconds"):
        StreamChat(app, public=True)


def test_an_app_that_asks_nobody_is_refused(upstream: FakeUpstream) -> None:
    with pytest.raises(SettingsError, match="authorize"):
        StreamChat(Flask("shop"))


# --- the worker -----------------------------------------------------------------------------------------


class Wrapped:
    """Middleware that keeps its application as `application`."""

    def __init__(self, application: Any) -> None:
        self.application = application

    def __call__(self, *given: Any) -> Any:
        return self.application(*given)


WRAPPINGS: dict[str, Callable[[Flask], Any]] = {
    "bare": lambda app: app,
    "its wsgi_app": lambda app: app.wsgi_app,
    "ProxyFix": lambda app: ProxyFix(app),
    "ProxyFix inside": lambda app: ProxyFix(app.wsgi_app),
    "two": lambda app: Wrapped(ProxyFix(app)),
    "a dispatcher": lambda app: DispatcherMiddleware(app, {}),
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_mounts_are_found_under_middleware(wrap: Callable[[Flask], Any], upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        assert mounts_of(wrap(shop.app)) == shop.mounts


def test_where_there_is_no_mount_none_is_found() -> None:
    loop = Wrapped(None)
    loop.application = loop
    applications: list[Any] = [None, Flask("shop"), lambda *_: [], loop]
    assert [mounts_of(application) for application in applications] == [[], [], [], []]


def test_a_worker_is_told_to_every_mount(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        StreamChat(app, public=True)
        StreamChat(app, public=True, name="second", url_prefix="/second")

    with open_shop(build) as shop:
        alive = [True]
        follow_worker(ProxyFix(shop.app.wsgi_app), lambda: not alive, 7, 0)
        assert [mount.process.live.most for mount in shop.mounts] == [7, 7]
        assert said(shop) == b"gpt-4.1-mini: hi"
        alive.clear()
        for mount in shop.mounts:
            mount.process.live.sweep()
        assert [shop.ask(url=url).status_code for url in ("/api/get-response", "/second/get-response")] == [503, 503]


def test_importing_the_package_starts_nothing_and_needs_no_gevent() -> None:
    code = (
        "import sys, threading, streamchat;"
        "assert threading.active_count() == 1;"
        "assert 'gevent' not in sys.modules and 'flask_sqlalchemy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
