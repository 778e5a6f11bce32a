"""A log of served requests: appended to, rotated, bounded in size, with samples that outlive what is dropped."""

from inference.traffic.log import TrafficConfig, TrafficLog
from inference.traffic.records import TrafficRecord, as_messages, pair_label, record_from, text_digest
from inference.traffic.samples import hard_sample, uniform_sample
from inference.traffic.segments import Traffic, read_traffic

__all__ = [
    "Traffic",
    "TrafficConfig",
    "TrafficLog",
    "TrafficRecord",
    "as_messages",
    "hard_sample",
    "pair_label",
    "read_traffic",
    "record_from",
    "text_digest",
    "uniform_sample",
]
