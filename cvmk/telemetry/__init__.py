"""What a run says while it goes on: events of a versioned schema, the logs that record them, and the terminal that shows them.

Imports nothing of cvmk but its errors and files.
"""

from cvmk.telemetry.anomalies import AnomalyWatch
from cvmk.telemetry.console import Reporter, reporter
from cvmk.telemetry.curves import Curves
from cvmk.telemetry.dashboard import TelemetryDashboard
from cvmk.telemetry.environment import environment
from cvmk.telemetry.events import RunLog
from cvmk.telemetry.reading import EventReader, read_events
from cvmk.telemetry.recorder import Iteration, Recorder
from cvmk.telemetry.resources import Gauges, ResourceWatch
from cvmk.telemetry.schema import Event, Record
from cvmk.telemetry.stream import EventStream, Subscriber
from cvmk.telemetry.terminal import Terminal

__all__ = [
    "AnomalyWatch",
    "Curves",
    "Event",
    "EventReader",
    "EventStream",
    "Gauges",
    "Iteration",
    "Record",
    "Recorder",
    "Reporter",
    "ResourceWatch",
    "RunLog",
    "Subscriber",
    "TelemetryDashboard",
    "Terminal",
    "environment",
    "read_events",
    "reporter",
]
