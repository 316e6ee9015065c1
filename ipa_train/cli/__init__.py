"""The `ipa` command: one file per verb, and the only code that knows Hydra."""
