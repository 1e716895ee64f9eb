"""Laws of the README and of docs/configuration.md: what they state about settings, commands and promises is true."""

from __future__ import annotations

import re
import tomllib

from twisted.trial.unittest import SynchronousTestCase

from cacheservice.config import DatasetSettings, reference
from tests.kit.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = ROOT / "docs" / "configuration.md"


def configuration_table() -> str:
    rows = [
        f"| `{path}` | {f'`{default}`' if default not in ('', 'required') else default} | {description} |"
        for path, default, description in reference()
    ]
    return "\n".join(["| key | default | meaning |", "| --- | --- | --- |", *rows])


class Readme(SynchronousTestCase):
    def test_the_configuration_table_is_the_codes(self) -> None:
        """The table of settings is what the code declares, key by key."""
        text = REFERENCE.read_text(encoding="utf-8")
        shown = re.search(r"<!-- configuration: .*? -->\n(.*?)\n<!-- end of configuration -->", text, re.S)
        assert shown is not None
        self.assertEqual(shown[1], configuration_table())

    def test_ci_runs_the_readmes_test_command(self) -> None:
        """.ci/run calls exactly the command of the README for the tests."""
        (command,) = re.findall(r"^python3 -m venv .* -m pytest$", README, re.M)
        self.assertIn(f"\n{command}\n", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))

    def test_the_example_configuration_is_valid(self) -> None:
        """The README's configuration loads."""
        (example,) = re.findall(r"```toml\n(.*?)```", README, re.S)  # tests/test_docs.py runs it
        (name, dataset), *others = tomllib.loads(example)["datasets"].items()
        self.assertEqual(others, [])
        self.assertEqual(DatasetSettings(name=name, **dataset).interval_s, 60)

    def test_promises_name_their_tests(self) -> None:
        """Each row of what happens when something goes wrong names a test that there is."""
        table = README.partition("## What it promises")[2].partition("## ")[0]
        rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
        self.assertGreater(len(rows), 15)
        for row in rows:
            named = re.search(r" `(test_\w+)\.(test_\w+)` \|$", row)
            assert named is not None, row
            modules = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(f"{named[1]}.py")]
            self.assertTrue(any(f"def {named[2]}(self" in module for module in modules), row)


if __name__ == "__main__":
    # Writes the table again: python -m tests.unit.test_readme
    text = re.sub(
        r"(<!-- configuration: .*? -->\n).*?(\n<!-- end of configuration -->)",
        lambda found: found[1] + configuration_table() + found[2],
        REFERENCE.read_text(encoding="utf-8"),
        flags=re.S,
    )
    REFERENCE.write_text(text, encoding="utf-8")
