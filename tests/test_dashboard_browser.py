"""Laws of the dashboard as people see it: in a real browser, before a real service on the real server."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from tests.kit.browser import running_browser
from tests.kit.capturing import LOGICAL
from tests.kit.daemon import OPEN_FILES, Daemon, DaemonTestCase
from tests.kit.http import ask_on
from tests.kit.standby import running_standby
from tests.kit.versions import MakeServer, running_server
from tests.kit.waiting import GIVE_UP_S, wait_until

MANY = 500
LONGEST_NAME = "long_" * 12 + "est"  # 63 characters

# The contrast of a text against the first background behind it that is not glass (WCAG 2.2, 1.4.3).
CONTRASTS = """
const luminance = ([r, g, b]) => {
  const part = (v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
const context = canvas.getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  context.clearRect(0, 0, 1, 1);
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data];
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
return [...document.querySelectorAll("h1, h2, h3, p, dt, dd, b, button, label, li span, figcaption")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true }) && element.textContent.trim())
  .filter((element) => !element.closest(".unseen, .skip"))
  .map((element) => {
    const [one, other] = [luminance(rgba(getComputedStyle(element).color)), luminance(behind(element))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    return [element.tagName + "." + element.className + ": " + element.textContent.trim().slice(0, 40), ratio];
  });
"""


class BrowserTestCase(DaemonTestCase):
    """Each test ends with a look at what the browser asked for, and at what it complained of."""

    complaints: tuple[str, ...] = ()
    browser: Any

    @classmethod
    def setUpClass(cls) -> None:
        cls.browser = running_browser(cls.addClassCleanup)

    def setUp(self) -> None:
        super().setUp()
        self.emulate(1440, 900)
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}/"
        self.allowed: list[str] = []

    def serve(self, *datasets: str, http: str = "", dsn: str | None = None, **options: Any) -> Daemon:
        """A service with its dashboard on `self.port`."""
        configuration = self.configuration(*datasets, dsn=dsn)
        own = f"[http]\nport = {self.port}\n{http}\n"
        return self.started(configuration.replace("[http]\nport = 0\n", own, 1), **options)

    def open(self, daemon: Daemon) -> None:
        daemon.event("service_started")
        self.browser.get("about:blank")
        for kind in ("browser", "performance"):
            self.browser.get_log(kind)  # those of the test before
        self.addCleanup(self.check_what_the_browser_did)
        self.browser.get(self.origin)

    def check_what_the_browser_did(self) -> None:
        asked = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = {
            message["params"]["request"]["url"] for message in asked if message["method"] == "Network.requestWillBeSent"
        }
        self.assertEqual({url for url in urls if not url.removeprefix("blob:").startswith(self.origin)}, set())
        told = [entry["message"] for entry in self.browser.get_log("browser")]
        self.assertEqual([text for text in told if not any(each in text for each in self.allowed)], [])
        self.assertEqual(self.browser.get_cookies(), [])
        self.browser.get("about:blank")

    def emulate(self, width: int, height: int, **media: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def find(self, selector: str) -> WebElement:
        element: WebElement = self.browser.find_element(By.CSS_SELECTOR, selector)
        return element

    def js(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """What it shows; empty for what is not there, or hidden."""
        script = "const e = document.querySelector(arguments[0]); return e && e.checkVisibility() ? e.textContent : ''"
        text: str = self.js(script, selector)
        return text

    def row(self, name: str, part: str) -> str:
        return self.text(f"#dataset-{name} .{part}")

    def wait_for(self, selector: str, text: str) -> None:
        wait_until(lambda: text in self.text(selector), f"{text!r} in {selector}")

    def wait_for_state(self, name: str, words: str) -> None:
        wait_until(lambda: self.row(name, "state") == words, f"{name} {words}")

    def shape(self, name: str) -> str:
        href: str = self.js("return document.querySelector(arguments[0]).getAttribute('href')", f"#dataset-{name} use")
        return href

    def order(self) -> list[str]:
        names: list[str] = self.js("return [...document.querySelectorAll('.dataset')].map((row) => row.dataset.name)")
        return names

    def command(self, name: str, command: str) -> None:
        with closing(socket.create_connection(("127.0.0.1", self.port), GIVE_UP_S)) as client:
            answer = ask_on(client, f"/v1/datasets/{name}/{command}", "POST", Authorization="Bearer operate")
            self.assertLess(answer.status, 300)

    def sql(self, statement: str) -> None:
        self.server.run_sql(statement, self.database)


def dataset(name: str, query: str, **settings: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([f"[datasets.{name}]", f"query = {json.dumps(query)}", 'key = "id"', *lines, ""])


TABLE = "CREATE TABLE {0} AS SELECT n AS id, 'row ' || n AS name FROM generate_series(1, 100) AS n"
OFTEN: Mapping[str, Any] = {"interval_s": 0.5, "timeout_s": 5, "retry_initial_s": 0.2, "retry_max_s": 0.4}


@pytest.mark.usefixtures("server_maker")
class Captured(BrowserTestCase):
    make_server: MakeServer

    def test_capture(self) -> None:
        """The head has whether changes are captured from the log, and why not, which is a problem."""
        watched = dataset("products", "SELECT * FROM products", **OFTEN | {"max_age_s": 3600})
        watched += 'watch = [{table = "public.products", key = "id"}]\n'
        with running_server(self.make_server, **LOGICAL) as server:
            server.run_sql(f"{TABLE.format('products')}; ALTER TABLE products ADD PRIMARY KEY (id)")
            daemon = self.serve(watched, dsn=server.dsn())
            daemon.wait_until_ready()
            self.open(daemon)
            self.wait_for("#headline", "1 problem")
            self.wait_for("#vital-capture", "NOT from the log")
            self.wait_for("#summary", "Changes are not captured from the log: There is no publication cacheservice;")
            server.run_sql("CREATE PUBLICATION cacheservice FOR TABLE products")
            self.wait_for("#vital-capture", "from the log")
            self.wait_for("#headline", "All well")
            self.find("#dataset-products .why").click()
            self.wait_for("#details-why", "Changes of its tables are read from the write-ahead log (slot cacheservice_")


class States(BrowserTestCase):
    def test_each_state(self) -> None:
        """The page shows for each dataset its state in words, shape and colour; problems stand first, each with a
        sentence on since when, why, and what comes next; once all is repaired, all is well."""
        for name in ("aging", "old", "shrunk", "kept"):
            self.sql(TABLE.format(name))
        daemon = self.serve(
            dataset("calm", "SELECT 1 AS id"),
            dataset("kept", "SELECT * FROM kept", **OFTEN | {"max_age_s": 3600}),
            dataset("shrunk", "SELECT * FROM shrunk", **OFTEN | {"max_age_s": 3600, "timeout_s": 300}),
            dataset("aging", "SELECT * FROM aging", **OFTEN | {"max_age_s": 3600, "timeout_s": 1}),
            dataset("missing", "SELECT * FROM missing", **OFTEN),
            dataset("old", "SELECT * FROM old", **OFTEN | {"max_age_s": 2}),
            http='admin_token = "operate"',
        )
        self.open(daemon)
        self.wait_for_state("missing", "never loaded, failing")
        for name in ("aging", "old", "shrunk", "kept", "calm"):
            self.wait_for_state(name, "fresh")
        self.assertEqual(self.text("#headline"), "1 problem")
        for name in ("aging", "old"):
            self.sql(f"ALTER TABLE {name} RENAME TO {name}_gone")
        self.sql("DELETE FROM shrunk WHERE id > 3")
        self.command("kept", "pin")
        self.wait_for_state("aging", "stale, failing")
        self.wait_for_state("old", "expired, failing")
        self.wait_for_state("shrunk", "fresh, held")
        self.wait_for_state("kept", "fresh, pinned")
        self.wait_for("#headline", "4 problems")
        self.wait_for("#summary", "Expired: old. Stale: aging. Never loaded: missing. Held back: shrunk.")
        self.wait_for("#vital-service", "not ready because of missing")
        self.assertEqual(self.order(), ["missing", "old", "shrunk", "aging", "kept", "calm"])
        self.assertEqual(
            {name: self.shape(name) for name in self.order()},
            {
                "missing": "#shape-alarm",
                "old": "#shape-alarm",
                "shrunk": "#shape-held",
                "aging": "#shape-warning",
                "kept": "#shape-pinned",
                "calm": "#shape-fine",
            },
        )
        self.assertRegex(
            self.row("old", "sentence"),
            r"^The data are from \d\d:\d\d:\d\d, \d+ s ago; the limit is 2 s, and readers still get them\. "
            r'The last \d+ refreshes failed, \d s ago: PostgreSQL: relation "old" does not exist \(SQLSTATE 42P01\)\. '
            r"(It tries again in [01] s|It is tried again right now|A refresh is due now)",
        )
        self.assertIn("is held back since", self.row("shrunk", "sentence"))
        self.assertIn("would drop 100 to 3 rows, limit 50 %", self.row("shrunk", "sentence"))
        self.assertIn("Nothing has been loaded yet", self.row("missing", "sentence"))
        self.assertEqual(self.row("calm", "sentence"), "")
        self.assertIn("problems", self.browser.title)

        for name in ("aging", "old"):
            self.sql(f"ALTER TABLE {name}_gone RENAME TO {name}")
        self.sql("INSERT INTO shrunk SELECT n, '' FROM generate_series(4, 100) AS n")
        self.sql(TABLE.format("missing"))
        self.command("kept", "unpin")
        self.wait_for("#headline", "All well")
        self.wait_for("#summary", "All 6 datasets are within their limits.")
        self.assertEqual(self.order(), ["calm", "kept", "shrunk", "aging", "missing", "old"])
        self.wait_for("#announcer", "is fresh")

    def test_a_database_that_does_not_answer(self) -> None:
        """During an outage the head shows that the database is down, why, and how old the newest data are."""
        self.sql(TABLE.format("products"))
        daemon = self.serve(dataset("products", "SELECT * FROM products", **OFTEN | {"timeout_s": 1, "max_age_s": 3}))
        daemon.wait_until_ready()
        self.open(daemon)
        self.wait_for("#headline", "All well")
        self.wait_for("#vital-postgres", "up")
        self.server.freeze(backends=True)
        try:
            self.wait_for("#headline", "PostgreSQL is down")
            self.wait_for("#summary", "Expired: products.")
            self.assertRegex(
                self.text("#summary"),
                r"^PostgreSQL did not .* The newest data were read \d+ s ago\. It is tried again ",
            )
            self.wait_for("#vital-postgres", "down")
            self.wait_for("#dataset-products .sentence", "because PostgreSQL is down.")
        finally:
            self.server.thaw()
        self.wait_for("#headline", "All well")

    def test_a_standby(self) -> None:
        """The head has how far the standby is behind and why; that it cannot listen is not a problem."""
        self.sql(TABLE.format("products"))
        watched = dataset("products", "SELECT * FROM products", notify="products", **OFTEN | {"max_age_s": 3600})
        with running_standby(self.server) as standby:
            daemon = self.serve(watched, dsn=standby(database=self.database))
            daemon.wait_until_ready()
            self.open(daemon)
            self.wait_for("#vital-listening", "not possible on a standby")
            self.wait_for("#headline", "All well")
            self.wait_for("#vital-postgres", "up, a standby")
            standby.sql("SELECT pg_wal_replay_pause()")
            self.sql("UPDATE products SET name = 'new'")
            self.wait_for("#vital-postgres", "up, a standby up to")
            self.wait_for("#summary", "behind: Replay is paused on the standby")

    def test_a_cap(self) -> None:
        """That fewer clients may connect than configured is a problem."""
        self.sql(TABLE.format("products"))
        daemon = self.serve(dataset("products", "SELECT * FROM products"), before=OPEN_FILES)
        daemon.wait_until_ready()
        self.open(daemon)
        self.wait_for("#headline", "1 problem")
        limit = daemon.event("connections_capped")["limit"]
        self.assertEqual(
            self.text("#summary"), f"Clients are capped at {limit} of 10,000 by the limit of 100 open files."
        )

    def test_a_load_that_takes_its_time(self) -> None:
        """While a dataset is read, its row shows how many of how many rows there are."""
        query = "SELECT n AS id, pg_sleep(0.02)::text AS nap FROM generate_series(1, 100000) AS n"
        self.open(self.serve(dataset("products", query, timeout_s=600)))
        self.wait_for_state("products", "never loaded")
        self.wait_for("#dataset-products .loading", "of about")
        self.assertRegex(self.row("products", "loading"), r"reading: [\d,]+ of about [\d,]+ rows")
        self.assertEqual(self.row("products", "next"), "reading now")
        self.assertEqual(self.text("#headline"), "Loading …")

    def test_a_change_in_the_database(self) -> None:
        """What changes in PostgreSQL is on the page by itself; the age restarts, and the chart has a line."""
        self.sql(TABLE.format("products"))
        self.open(self.serve(dataset("products", "SELECT * FROM products", **OFTEN)))
        self.wait_for("#dataset-products .rows", "100")
        self.sql("INSERT INTO products SELECT n, 'new' FROM generate_series(101, 1234) AS n")
        self.wait_for("#dataset-products .rows", "1,234")
        self.wait_for("#dataset-products .hour", "took ≤")
        self.sql("UPDATE products SET name = 'other' WHERE id <= 7; DELETE FROM products WHERE id > 1230")
        wait_until(lambda: self.row("products", "rows") == "1,230", "the deleted rows")
        generation = int(self.row("products", "generation"))
        self.sql("UPDATE products SET name = 'another' WHERE id = 1")
        wait_until(lambda: int(self.row("products", "generation")) > generation, "the next generation")
        self.assertEqual(self.js("return document.querySelectorAll('#dataset-products canvas').length"), 1)
        label = self.find("#dataset-products .chart").accessible_name
        self.assertRegex(label, r"^In the last 5 min readers got data at most \d+ s old; the slowest attempt took ")

    def test_a_reload(self) -> None:
        """A dataset that a new configuration brings is there, one that is gone is not, and the others stay."""
        one, two, three = (dataset(name, "SELECT 1 AS id") for name in ("one", "two", "three"))
        daemon = self.serve(one, two)
        self.open(daemon)
        self.wait_for_state("two", "fresh")
        row = self.find("#dataset-two")
        file = self.directory / "cacheservice.toml"
        file.write_text(file.read_text().replace(one, three))
        daemon.process.send_signal(signal.SIGHUP)
        self.wait_for_state("three", "fresh")
        self.assertEqual(self.order(), ["three", "two"])
        self.assertTrue(row.is_displayed())
        file.write_text(file.read_text().replace("interval_s", "intervals") + "nonsense = 1\n")
        daemon.process.send_signal(signal.SIGHUP)
        self.wait_for("#headline", "1 problem")
        self.wait_for("#summary", "The newest configuration is not in effect: ")

    def test_ages_count_between_events(self) -> None:
        """An age goes on without any event, by a monotonic clock: setting the browser's wall clock changes nothing."""
        self.open(self.serve(dataset("products", "SELECT 1 AS id")))
        self.wait_for("#dataset-products .age-now", "2 s")
        self.js("Date.now = () => 0; const Real = Date; window.Date = class extends Real {constructor() {super(0)}}")
        self.wait_for("#dataset-products .age-now", "5 s")

    def test_whatever_an_error_says_is_text(self) -> None:
        """Markup in a message of PostgreSQL is shown as it is, and is never a part of the page."""
        query = 'SELECT "<img src=x onerror=alert(1)><b id=evil>" AS id'
        self.open(self.serve(dataset("products", query, **OFTEN)))
        self.wait_for("#dataset-products .sentence", "<img src=x onerror=alert(1)>")
        self.find("#dataset-products .why").click()
        self.wait_for("#details-why", "<img src=x onerror=alert(1)>")
        self.assertEqual(self.js("return document.querySelectorAll('img, #evil').length"), 0)


class Operating(BrowserTestCase):
    def test_accepting_what_is_held(self) -> None:
        """Buttons are there once the admin token is entered, and only while there is something to do; they do it."""
        self.sql(TABLE.format("products"))
        products = dataset("products", "SELECT * FROM products", **OFTEN | {"max_age_s": 3600, "interval_s": 2})
        calm = dataset("calm", "SELECT 1 AS id, clock_timestamp()")
        daemon = self.serve(products, calm, http='admin_token = "operate"')
        daemon.wait_until_ready()
        self.open(daemon)
        self.allowed = ["401 (Unauthorized)"]
        self.wait_for_state("products", "fresh")
        self.assertFalse(self.find("#dataset-products .refresh").is_displayed())
        self.sql("DELETE FROM products WHERE id > 3")
        self.wait_for_state("products", "fresh, held")
        self.assertFalse(self.find("#dataset-products .accept").is_displayed())

        self.find("#operator").click()
        self.find("#operator-token").send_keys("guess", Keys.ENTER)
        self.wait_for("#operator-problem", "This is not the token of http.admin_token.")
        self.assertIsNone(self.js("return sessionStorage.getItem('cacheservice.token')"))
        self.find("#operator-token").clear()
        self.find("#operator-token").send_keys("operate", Keys.ENTER)
        wait_until(lambda: self.find("#dataset-products .accept").is_displayed(), "the button")
        self.assertFalse(self.find("#operator-dialog").is_displayed())
        self.assertTrue(self.find("#dataset-calm .refresh").is_displayed())
        self.assertFalse(self.find("#dataset-calm .accept").is_displayed())

        generation = int(self.row("calm", "generation"))
        self.find("#dataset-calm .refresh").click()
        wait_until(lambda: int(self.row("calm", "generation")) == generation + 1, "the refresh")

        self.find("#dataset-products .accept").click()
        self.wait_for("#confirm-text", "would drop 100 to 3 rows")
        self.find("#confirm button.strong").click()
        self.wait_for_state("products", "fresh")
        wait_until(lambda: self.row("products", "rows") == "3", "the accepted result")
        self.assertFalse(self.find("#dataset-products .accept").is_displayed())

        self.browser.refresh()
        wait_until(lambda: self.find("#dataset-calm .refresh").is_displayed(), "the kept token")
        self.find("#forget").click()
        wait_until(lambda: not self.find("#dataset-calm .refresh").is_displayed(), "the end of the buttons")
        self.assertEqual(self.js("return [sessionStorage.length, localStorage.length]"), [0, 0])

    def test_without_an_admin_token(self) -> None:
        """Where there is none, nothing asks for it."""
        self.open(self.serve(dataset("products", "SELECT 1 AS id")))
        self.wait_for_state("products", "fresh")
        self.assertFalse(self.find("#operator").is_displayed())

    def test_a_token_for_reading(self) -> None:
        """Where reading needs a token the page asks for it, reports a wrong one, keeps it for the tab alone, and asks
        again when it is another."""
        daemon = self.serve(dataset("products", "SELECT 1 AS id"), http='token = "s3cret"')
        self.open(daemon)
        self.allowed = ["401 (Unauthorized)", "net::ERR"]
        wait_until(lambda: self.find("#ask").is_displayed(), "the question")
        self.assertEqual(self.text("#datasets"), "")
        self.find("#ask-token").send_keys("guess", Keys.ENTER)
        self.wait_for("#ask-problem", "This is not the token of http.token.")
        self.find("#ask-token").send_keys("s3cret", Keys.ENTER)
        self.wait_for_state("products", "fresh")
        self.wait_for("#dataset-products .hour", "took ≤")
        self.find("#dataset-products .why").click()
        self.wait_for("#details-why", "products is fresh")
        self.browser.refresh()
        self.wait_for_state("products", "fresh")
        self.assertEqual(self.js("return localStorage.length"), 0)
        self.assertNotIn("s3cret", self.browser.current_url)
        daemon.end()
        self.serve(dataset("products", "SELECT 1 AS id"), http='token = "0ther"')
        self.wait_for("#ask-problem", "This is not the token of http.token.")
        self.assertEqual((self.text("#datasets"), self.text("#lost"), self.text("#vitals")), ("", "", ""))
        self.find("#ask-token").send_keys("0ther", Keys.ENTER)
        self.wait_for("#headline", "All well")


class Connection(BrowserTestCase):
    def test_lost_and_found(self) -> None:
        """When the service goes, the page shows that, since when, and that it tries again, and ages go on; when it is
        back, all is live again by itself."""
        self.sql(TABLE.format("products"))
        products = dataset("products", "SELECT * FROM products", interval_s=1.0, timeout_s=2, max_age_s=4.0)
        daemon = self.serve(products)
        self.open(daemon)
        self.allowed = ["net::ERR"]
        self.wait_for_state("products", "fresh")
        self.assertEqual(self.text("#vital-page"), "live")
        daemon.end()
        self.wait_for("#headline", "No connection")
        self.wait_for("#lost", "No connection to the service since ")
        self.wait_for("#lost", "Next try in ")
        self.wait_for_state("products", "expired")
        self.wait_for("#vital-page", "not live since")
        self.wait_for("#announcer", "connection to the service is lost")
        # It was fetched while there was a service to fetch it from.
        self.assertTrue(self.js("return document.getElementById('icon').href").startswith("blob:"))
        self.assertEqual(self.row("products", "next"), "not known")
        age = int(self.row("products", "age-now").removesuffix(" s"))
        wait_until(lambda: int(self.row("products", "age-now").removesuffix(" s")) > age, "a greater age")
        self.sql("INSERT INTO products VALUES (101, 'new')")
        self.serve(products)
        self.wait_for("#headline", "All well")
        self.assertEqual(self.text("#vital-page"), "live")
        self.assertEqual(self.text("#lost"), "")
        self.wait_for("#dataset-products .rows", "101")

    def test_a_service_that_falls_silent(self) -> None:
        """When the service hangs with its connections open, the page shows that, too, and recovers with it."""
        daemon = self.serve(dataset("products", "SELECT 1 AS id"))
        self.open(daemon)
        self.wait_for_state("products", "fresh")
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            self.wait_for("#lost", "It went silent.")
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        self.wait_for("#headline", "All well")
        self.assertEqual(self.text("#vital-page"), "live")


class Reach(BrowserTestCase):
    def products(self) -> Daemon:
        self.sql(TABLE.format("products"))
        return self.serve(
            dataset("calm", "SELECT 1 AS id"),
            dataset("products", "SELECT * FROM products", **OFTEN | {"max_age_s": 3600}),
            dataset(LONGEST_NAME, "SELECT * FROM missing", **OFTEN),
            http='admin_token = "operate"',
        )

    def assert_nothing_is_cut_off(self) -> None:
        script = """
        const [width] = arguments, cut = [];
        for (const element of document.querySelectorAll(".dataset *, .head *, .tools *")) {
          const box = element.getBoundingClientRect();
          if (box.width && box.right > width + 0.5 && element.checkVisibility()) cut.push(element.outerHTML);
        }
        return [Math.max(document.documentElement.scrollWidth, width), cut];
        """
        for width in (320, 390, 768, 1024, 1280, 1440, 1800, 2560):
            self.emulate(width, 900)
            # Charts are redrawn a moment after the width has changed.
            wait_until(lambda width=width: self.js(script, width) == [width, []], f"a page that fits into {width} px")

    def test_on_a_phone(self) -> None:
        """From 320 px on nothing is cut off sideways, with an operator's buttons or without, nor in the dialog."""
        daemon = self.products()
        self.open(daemon)
        self.wait_for_state("products", "fresh")
        self.assert_nothing_is_cut_off()
        self.emulate(320, 700)
        self.find("#operator").click()
        self.find("#operator-token").send_keys("operate", Keys.ENTER)
        wait_until(lambda: self.find("#dataset-products .refresh").is_displayed(), "the button")
        self.assert_nothing_is_cut_off()
        self.emulate(320, 700)
        self.find("#dataset-products .why").click()
        self.wait_for("#details-why", "products is fresh")
        wait_until(lambda: self.js("return document.querySelectorAll('#details canvas').length") == 2, "the charts")
        script = "const d = document.querySelector('#details'); const {right} = d.getBoundingClientRect();"
        too_wide, right = self.js(f"{script} return [d.scrollWidth - d.clientWidth, right]")
        self.assertLessEqual(too_wide, 0)
        self.assertLessEqual(right, 320)

    def test_contrast(self) -> None:
        """In light and dark, with problems and without, each text has a contrast of 4.5 to 1 (WCAG 2.2, AA)."""
        self.open(self.products())
        self.wait_for("#headline", "1 problem")
        grounds = set()
        for scheme in ("light", "dark"):
            self.emulate(1440, 900, prefers_color_scheme=scheme)
            grounds.add(self.js("return getComputedStyle(document.body).backgroundColor"))
            measured = self.js(CONTRASTS)
            self.assertGreater(len(measured), 40)
            self.assertEqual([(text, ratio) for text, ratio in measured if ratio < 4.5], [])
        self.assertEqual(len(grounds), 2)
        self.sql(TABLE.format("missing"))
        self.wait_for("#headline", "All well")
        for scheme in ("light", "dark"):
            self.emulate(1440, 900, prefers_color_scheme=scheme)
            self.assertEqual([(text, ratio) for text, ratio in self.js(CONTRASTS) if ratio < 4.5], [])

    def test_by_keyboard(self) -> None:
        """Tab reaches the reasons of a dataset, Enter opens them, Escape closes them, and the focus is where it was,
        also when the dataset has moved meanwhile; what has the focus is outlined."""
        self.open(self.products())
        self.wait_for_state("products", "fresh")
        focused = self.browser.switch_to
        for _ in range(20):
            self.find("body").send_keys(Keys.TAB) if focused.active_element.tag_name == "body" else None
            focused.active_element.send_keys(Keys.TAB)
            if focused.active_element.accessible_name == "Why? The state of products":
                break
        self.assertEqual(focused.active_element.accessible_name, "Why? The state of products")
        self.assertNotEqual(focused.active_element.value_of_css_property("outline-style"), "none")
        focused.active_element.send_keys(Keys.ENTER)
        self.wait_for("#details-why", "products is fresh")
        self.wait_for("#details-facts", "interval")
        self.sql("DELETE FROM products WHERE id > 3")
        self.wait_for("#details-why", "has been held for")
        focused.active_element.send_keys(Keys.ESCAPE)
        wait_until(lambda: not self.find("#details").is_displayed(), "the end of the dialog")
        self.assertEqual(focused.active_element.accessible_name, "Why? The state of products")
        self.sql("INSERT INTO products SELECT n, '' FROM generate_series(4, 100) AS n")
        self.wait_for_state("products", "fresh")
        self.assertEqual(self.order()[-1], "products")
        self.sql("DELETE FROM products WHERE id > 3")
        self.wait_for_state("products", "fresh, held")
        self.assertEqual(self.order()[-1], "calm")
        self.assertEqual(focused.active_element.accessible_name, "Why? The state of products")

    def test_for_a_screen_reader(self) -> None:
        """There are landmarks and one main heading; each control has a name; each dataset is an item with a heading."""
        self.open(self.products())
        self.wait_for_state("products", "fresh")
        self.assertEqual(self.find("main").aria_role, "main")
        self.assertEqual(self.find("header").aria_role, "banner")
        self.assertEqual(self.find("footer").aria_role, "contentinfo")
        self.assertEqual(len(self.browser.find_elements(By.TAG_NAME, "h1")), 1)
        self.assertEqual(self.find("html").get_attribute("lang"), "en")
        for control in self.browser.find_elements(By.CSS_SELECTOR, "button, input"):
            if control.is_displayed():
                self.assertTrue(control.accessible_name, control.get_attribute("outerHTML"))
        self.assertEqual((self.find("#list").aria_role, self.find(".dataset").aria_role), ("list", "listitem"))
        self.assertEqual(self.find(".dataset h3").aria_role, "heading")
        self.assertEqual(self.find("#announcer").get_attribute("aria-live"), "polite")

    def test_reduced_motion(self) -> None:
        """A user who wants no motion gets none."""
        self.emulate(1440, 900, prefers_reduced_motion="reduce")
        self.open(self.products())
        self.wait_for_state("products", "fresh")
        duration = self.find("#dataset-products .fill").value_of_css_property("transition-duration")
        self.assertEqual(duration, "0s")


class Many(BrowserTestCase):
    def test_five_hundred_datasets(self) -> None:
        """With 500 datasets all are there, charts are drawn only for those in sight, and the filter finds one."""
        daemon = self.serve(*(dataset(f"dataset_{number:03}", "SELECT 1 AS id") for number in range(MANY)))
        daemon.wait_until_ready()
        self.open(daemon)
        self.wait_for("#summary", "All 500 datasets are within their limits.")
        self.assertEqual(len(self.order()), MANY)
        wait_until(lambda: self.js("return document.querySelectorAll('canvas').length"), "charts")
        self.assertLess(self.js("return document.querySelectorAll('canvas').length"), 40)
        self.find("#filter").send_keys("set_321")
        self.wait_for("#shown", "1 of 500 datasets shown")
        self.assertTrue(self.find("#dataset-dataset_321").is_displayed())
        wait_until(
            lambda: self.js("return document.querySelectorAll('#dataset-dataset_321 canvas').length") == 1, "its chart"
        )
        self.find("#filter").clear()
        self.find("#filter").send_keys(Keys.ESCAPE)
        self.find("#only-problems").click()
        self.wait_for("#shown", "0 of 500 datasets shown")
