"""The GPU backend: every op a Triton kernel behind ``torch.library``; matrix products are cuBLAS's.

Activations run (batch, length, channel) and no length is special. Arithmetic is fp32 for every narrower dtype. The same
code runs on CPU tensors in Triton's interpreter, which is how it is tested without a GPU.
"""

from __future__ import annotations

from simba_lab.kernels.gpu.adjacency import true_neighbours as true_neighbours
from simba_lab.kernels.gpu.conv import causal_conv as causal_conv
from simba_lab.kernels.gpu.conv import neighbour_conv as neighbour_conv
from simba_lab.kernels.gpu.cross_entropy import cross_entropy as cross_entropy
from simba_lab.kernels.gpu.gated_norm import gated_rms_norm as gated_rms_norm
from simba_lab.kernels.gpu.gather import keep_tokens as keep_tokens
from simba_lab.kernels.gpu.impact import global_impact as global_impact
from simba_lab.kernels.gpu.norm import add_rms_norm as add_rms_norm
from simba_lab.kernels.gpu.norm import keep_add_rms_norm as keep_add_rms_norm
from simba_lab.kernels.gpu.scan import selective_scan as selective_scan
from simba_lab.kernels.gpu.select import select_tokens as select_tokens
from simba_lab.kernels.gpu.ssd_scan import ssd as ssd
from simba_lab.kernels.gpu.ssd_scores import ssd_impact as ssd_impact
from simba_lab.kernels.reference import linear as linear
from simba_lab.kernels.reference import scored_scan as scored_scan
