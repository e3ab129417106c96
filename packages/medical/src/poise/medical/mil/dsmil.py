r"""Dual-stream multiple-instance learning (DSMIL): attention by likeness to the most telling instance of each class.

Li, Li and Eliceiri, "Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with Self-supervised
Contrastive Learning", CVPR 2021, arXiv 2011.08939.

With instance logits :math:`c_n = W_i x_n` and the critical instance :math:`m_c = \arg\max_n c_{nc}` of every class,

.. math:: A_{cn} = \langle Q x_n, Q x_{m_c} \rangle / \sqrt{d_q}, \qquad B_c = \sum_n \mathrm{softmax}(A_c)_n x_n, \qquad
          L = \tfrac12 CE(\max_n c_n, y) + \tfrac12 CE(\mathrm{conv}(B), y)

>>> import torch
>>> reading = DSMIL(in_dim=384, num_classes=2).read(torch.randn(1, 500, 384))
>>> reading.logits.shape, reading.scores.shape, reading.instance_logits.shape
(torch.Size([1, 2]), torch.Size([1, 2, 500]), torch.Size([1, 500, 2]))
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from poise.medical.mil.bags import check_bags
from poise.medical.mil.reading import BagModel, Reading


class DSMIL(BagModel):
    """Both streams; the prediction is the mean of their two distributions.

    Args:
        in_dim: features of an instance.
        num_classes: classes of a bag.
        att_dim: width of the query Q.
    """

    def __init__(self, in_dim: int, num_classes: int = 2, *, att_dim: int = 128) -> None:
        super().__init__()
        self.instance_classifier = nn.Linear(in_dim, num_classes)
        self.query = nn.Linear(in_dim, att_dim)
        self.bag_classifier = nn.Conv1d(num_classes, num_classes, kernel_size=in_dim)

    def read(self, bags: Float[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> Reading:
        check_bags(bags, mask, self.query.in_features)
        instance_logits = self.instance_classifier(bags)
        real = instance_logits if mask is None else instance_logits.masked_fill(~mask.unsqueeze(-1), -math.inf)
        most, critical = real.max(1)  # (bags, classes)
        query = self.query(bags)
        critical_query = query.gather(1, critical.unsqueeze(-1).expand(-1, -1, query.shape[-1]))
        scores = critical_query @ query.mT / math.sqrt(query.shape[-1])
        masked = scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), -math.inf)
        bag_logits = self.bag_classifier(masked.softmax(-1) @ bags).squeeze(-1)
        mean = torch.logaddexp(most.log_softmax(-1), bag_logits.log_softmax(-1)) - math.log(2)
        return Reading(mean, scores, (most, bag_logits), instance_logits)
