r"""ADELE: find when a segmentation network begins to memorise badly drawn masks, class by class, and correct the masks from then on.

Liu, Liu, Zhu, Shen and Fernandez-Granda, "Adaptive Early-Learning Correction for Segmentation from Noisy Annotations", CVPR 2022,
arXiv 2110.03740.

A network first learns the true shapes, then the annotator's mistakes, and each class reaches that point at its own time. Three parts:

- **Detection.** The IoU of the training predictions with the masks in use is fitted, for each class, by
  :math:`f(t) = a (1 - \exp(-t^b / c))`. Memorisation sets in where its slope has lost the share r of what it was at epoch 1.
- **Correction.** From then on pixels of that class take the prediction, where it is confident.
- **Consistency.** Predictions at three scales are drawn to their mixture, which keeps the confident ones trustworthy:
  :math:`\sum_i KL(p_i \| q)`, :math:`q = \sum_i w_i p_i`.

:class:`AdeleTrainer` is all of it; the parts go into a training loop of your own:

>>> import torch
>>> from poise.medical import AdeleLoss, LabelStore, MemorizationDetector, StreamingIoU, multiscale_forward
>>> images, masks = torch.randn(6, 1, 16, 16), torch.randint(0, 3, (6, 16, 16))
>>> model = torch.nn.Conv2d(1, 3, 3, padding=1)
>>> optimizer, criterion = torch.optim.SGD(model.parameters(), 0.1), AdeleLoss(weight=1.0)
>>> store, iou = LabelStore(masks, num_classes=3), StreamingIoU(3)
>>> detector = MemorizationDetector(num_classes=3, total_epochs=4)
>>> for epoch in range(4):
...     for index in torch.randperm(6).split(2):
...         labels = store.read(index)
...         logits = multiscale_forward(model, images[index])
...         loss = criterion(logits, labels)
...         optimizer.zero_grad()
...         loss.backward()
...         optimizer.step()
...         probabilities = logits[1].detach().softmax(1)
...         store.remember(index, probabilities)
...         iou.update(probabilities.argmax(1), labels)
...     triggered = detector.update(iou.compute())
...     iou.reset()
...     changed = store.correct(triggered)  # pixels that the next epoch sees with another label

Nothing here is meant for, or was tested for, clinical use.
"""
