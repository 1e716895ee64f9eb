"""A real browser for tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from twisted.trial.unittest import SkipTest

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # root is not allowed one
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--lang=en",
)


def running_browser(add_cleanup: Callable[..., object]) -> Any:
    """Start a browser that asks nobody else for anything, in a folder of its own; return its driver.

    :raises SkipTest: without Chromium.
    """
    if not (os.path.exists(CHROMIUM) and os.path.exists(DRIVER)):
        raise SkipTest("there is no Chromium: apt-get install chromium chromium-driver")
    os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    folder = tempfile.mkdtemp(prefix="cacheservice-chromium-")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={folder}", "--window-size=1440,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    add_cleanup(shutil.rmtree, folder, ignore_errors=True)
    browser = webdriver.Chrome(service=Service(DRIVER), options=options)
    add_cleanup(browser.quit)
    return browser
