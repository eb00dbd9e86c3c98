"""Trains the tiny model; this code imports the package wanfast, which never imports it."""
