"""Exceptions to the rules of the house tests, each with its reason. What is not here keeps the rules."""

from __future__ import annotations

# Modules that rename something other than one file of revox.
RENAMES = {
    "lab.recover",  # a whole folder, made beside and renamed once
    "lab.speech.kokoro",  # runs in an environment without revox
    "lab.speech.whisper_ct2",  # the same
    "revox.demo.demo",  # a whole folder
    "revox.checkpoint.voice_journal",  # moves staged files, as its journal says
    "revox.checkpoint.inject",  # a whole folder
}

# Commands that take no checkpoint.
OTHER_CHECKPOINTS = {
    "bench",
    "demo",
    "deploy check",
    "encoder push",
    "find",
    "keys add",
    "keys list",
    "keys remove",
    "verify",
}

# Functions whose parameters are a user's options, as a command's are.
DOORS = {"revox.api.clone"}

# Words of the table that remain: old names that work for one version, keys on users' disks or in the API.
TERMS = {
    "revox.api: quick encoder",  # Revox.clone(quick_encoder=), of 0.1
    "revox.api: synthesise",  # Revox.synthesise, of 0.1
    "revox.cli.voice_command: kept",  # a key of `revox voice list --json`
    "revox.serving.page_routes: judge",  # a key of the API
    "revox.serving.voice_files: kept",  # keys of uploaded voices' records
    "revox.serving.voice_files: one off",
    "revox.serving.voice_routes: kept",  # a key of the API
}
