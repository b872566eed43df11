"""librdkafka's own Kafka cluster: real sockets, offsets and timestamps, without a broker to install."""

from __future__ import annotations

import json
import uuid
from datetime import datetime

from confluent_kafka import Producer


class Cluster:
    """A mock cluster of one broker; it lives as long as its producer."""

    def __init__(self) -> None:
        self.producer = Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
        (broker,) = self.producer.list_topics(timeout=60).brokers.values()
        self.bootstrap = f"{broker.host}:{broker.port}"

    def send(self, topic: str, partition: int, moment: datetime, value: bytes | None = b"") -> None:
        body = value if value != b"" else json.dumps({"event_id": uuid.uuid4().hex}).encode()
        self.producer.produce(topic, body, partition=partition, timestamp=int(moment.timestamp() * 1000))
        assert self.producer.flush(60) == 0
