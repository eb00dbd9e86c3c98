"""Defines the tiny model's sizes; head dim 128 equals A14B's, so that every kernel of the real model runs on it."""

from __future__ import annotations

from wanfast.runtime.facts.model_spec import DiTSpec, ModelSpec, UMT5Spec, VAESpec

SPEC = ModelSpec(
    name="tiny",
    dit=DiTSpec(dim=256, ffn_dim=640, num_heads=2, num_layers=5, freq_dim=64, text_dim=96, text_len=64),
    vae=VAESpec(base_dim=16),
    umt5=UMT5Spec(vocab_size=960, dim=96, attention_dim=96, ffn_dim=256, num_heads=4, num_layers=3),
    size="128x128",
    frames=17,
    shift_480p=None,
    trained_frames=None,
    guidance_high_noise=2.0,
    guidance_low_noise=2.0,
    negative_prompt="",  # in training, dropped captions become this text
)
