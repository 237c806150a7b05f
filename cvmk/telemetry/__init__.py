"""What a run says while it goes on: structured events, a rotating log, and the terminal. Imports nothing of cvmk but its errors and files."""

from cvmk.telemetry.console import Reporter, reporter
from cvmk.telemetry.environment import environment
from cvmk.telemetry.events import RunLog

__all__ = ["Reporter", "RunLog", "environment", "reporter"]
