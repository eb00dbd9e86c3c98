"""Writes a small model with the public libraries, in the layout of the published Diffusers repository."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wanfast.bench.model_folder import randomise
from wanfast.runtime.store.model_files import TINY


def transformer(seed: int, in_channels: int = 36) -> WanTransformer3DModel:
    """Returns an expert of WAN_SPEC's test size; the two experts differ by their seed."""
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=16,
        text_dim=24,
        freq_dim=32,
        ffn_dim=160,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    randomise(model, seed)
    return model.eval()


def pipeline(*, takes_images: bool = True) -> WanImageToVideoPipeline | WanPipeline:
    """Returns a pipeline that makes videos from images, or from text alone."""
    kind, in_channels = (WanImageToVideoPipeline, 36) if takes_images else (WanPipeline, 16)
    vae = AutoencoderKLWan(base_dim=8)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=960, d_model=24, d_kv=16, d_ff=40, num_heads=4, num_layers=2, dropout_rate=0.0)
    ).eval()
    randomise(vae, seed=13)
    randomise(text_encoder, seed=14)
    return kind(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(TINY / "tokenizer/tokenizer.json"),
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
        text_encoder=text_encoder,
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0 if takes_images else 12.0,
        ),
        transformer=transformer(11, in_channels),
        transformer_2=transformer(12, in_channels),
        boundary_ratio=0.9 if takes_images else 0.875,
    )


def save_diffusers(folder: Path, *, takes_images: bool = True) -> WanImageToVideoPipeline | WanPipeline:
    """Writes the model and returns the pipeline that wrote it."""
    torch.manual_seed(0)
    public = pipeline(takes_images=takes_images)
    public.save_pretrained(folder)
    return public
