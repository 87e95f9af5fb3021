"""The worker: Kafka in, adapted users out."""
