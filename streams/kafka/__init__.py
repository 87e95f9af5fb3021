"""The wire to Kafka: record batches read and written without an object for each record, and the keys' partitions."""
