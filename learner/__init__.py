"""The learner: arrays in, arrays out; no broker, no store, no HTTP."""
