"""Fourier transforms, windows and the mel filter bank."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.network.operators_types import TORCH_TYPES, Ints, Number, ints, number


def dft(
    x: Tensor, dft_length: Ints | None = None, axis: Ints | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """The last axis holds 1 (real) or 2 (real, imaginary) numbers, in and out."""
    over = (-2 if axis is None else int(number(axis))) % x.dim()
    length = None if dft_length is None else int(number(dft_length))
    if onesided and inverse:  # from half a spectrum back to a real signal
        spectrum = torch.view_as_complex(x.contiguous())
        real: Tensor = torch.fft.irfft(spectrum, length, over)
        return real.unsqueeze(-1)
    signal = x.squeeze(-1) if x.shape[-1] == 1 else torch.view_as_complex(x.contiguous())
    transform = torch.fft.ifft if inverse else torch.fft.rfft if onesided else torch.fft.fft
    return torch.view_as_real(transform(signal, length, over))


def stft(
    signal: Tensor,
    frame_step: Ints,
    window: Tensor | None = None,
    frame_length: Ints | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """signal (batch, samples, 1 or 2) → (batch, frames, bins, 2)."""
    length = (
        int(number(frame_length))
        if frame_length is not None
        else len(window)
        if window is not None
        else signal.shape[1]
    )
    frames = signal.unfold(1, length, int(number(frame_step)))  # (batch, frames, 1 or 2, length)
    if window is not None:
        left = (length - len(window)) // 2
        frames = frames * F.pad(window, (left, length - len(window) - left))
    real = frames[:, :, 0]
    if signal.shape[2] == 1:
        return torch.view_as_real(torch.fft.rfft(real) if onesided else torch.fft.fft(real))
    return torch.view_as_real(torch.fft.fft(torch.complex(real, frames[:, :, 1])))


def _window(size: Ints, coefficients: tuple[float, ...], periodic: int, output_datatype: int) -> Tensor:
    (n,) = ints(size)
    step = 2 * math.pi * torch.arange(n, dtype=torch.float64) / (n if periodic else n - 1)
    window = torch.zeros_like(step)
    for k, c in enumerate(coefficients):
        window += (-1) ** k * c * torch.cos(k * step)
    return window.to(TORCH_TYPES[output_datatype])


def hann_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, (0.5, 0.5), periodic, output_datatype)


def hamming_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, (25 / 46, 21 / 46), periodic, output_datatype)


def blackman_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _window(size, (0.42, 0.5, 0.08), periodic, output_datatype)


def mel_weight_matrix(
    num_mel_bins: Ints,
    dft_length: Ints,
    sample_rate: Ints,
    lower_edge_hertz: Number,
    upper_edge_hertz: Number,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """(dft_length // 2 + 1, num_mel_bins): triangles, evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    bins, length, rate = int(number(num_mel_bins)), int(number(dft_length)), number(sample_rate)
    low, high = (2595 * math.log10(1 + number(edge) / 700) for edge in (lower_edge_hertz, upper_edge_hertz))
    # ONNX divides the mel range by the number of places, so the last one stays a step below the upper edge.
    mel = low + torch.arange(bins + 2, dtype=torch.float64) * ((high - low) / (bins + 2))
    places = torch.floor((length + 1) * 700 * (10 ** (mel / 2595) - 1) / rate)
    spectrum = torch.arange(length // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = places[:-2], places[1:-1], places[2:]
    rising = torch.where(centre > left, (spectrum - left) / (centre - left), (spectrum == centre).double())
    falling = torch.where(right > centre, (right - spectrum) / (right - centre), 0)
    weights = torch.where(spectrum <= centre, rising, falling).clamp(min=0)
    weights = torch.where((spectrum == centre) & (right > centre), 1, weights)
    return weights.to(TORCH_TYPES[output_datatype])
