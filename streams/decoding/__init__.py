"""From the bytes of a topic's records to columnar events: JSON, Avro and Protobuf."""
