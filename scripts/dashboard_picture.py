"""A picture of the Ray dashboard's actors while a run is under way: python scripts/dashboard_picture.py URL OUT.png

URL is what the run prints after "ray", such as http://127.0.0.1:8265. Needs a Chromium and Playwright, which are no
part of the set-up: apt install chromium; pip install playwright
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROLES = ("rollout-0", "teacher-0", "learner-0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the dashboard, as the run prints it")
    parser.add_argument("out", type=Path, help="PNG to write")
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        sys.exit("dashboard_picture.py: playwright is not installed here: pip install playwright")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("dashboard_picture.py: no Chromium found: set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1440, "height": 720})
        log_in(context, args.url)
        page = context.new_page()
        page.goto(f"{args.url}/#/actors")
        for role in ROLES:
            page.get_by_text(role, exact=True).first.wait_for(timeout=60_000)
        page.screenshot(path=args.out)
        browser.close()


def log_in(context, url: str) -> None:
    """Ray's token for its cookie. Every page asks for it, and a picture cannot answer."""
    ray = Path(sys.executable).parent / "ray"
    token = subprocess.run([ray, "get-auth-token"], check=True, capture_output=True, text=True).stdout.strip()
    answer = context.request.post(f"{url}/api/authenticate", headers={"Authorization": f"Bearer {token}"})
    if not answer.ok:
        sys.exit(f"dashboard_picture.py: {url} does not take the token of `ray get-auth-token`: HTTP {answer.status}")


if __name__ == "__main__":
    main()
