"""What no docstring of a method can say, for its page; used by make_methods.py."""

from __future__ import annotations

SELECTIVITY = """\
![Drop frequency against correlation](corrdrop_selectivity.png)

How often a unit is dropped, against its mean correlation with the others: on a synthetic map of
which one half is correlated, and on a map of a trained network. The published rule
(`faithful=True`) is nearly flat; the default drops what correlates little."""

AUTO_DROPOUT = """\
The published search for patterns is a method of
[searches](../studies.md#autodropouts-search-and-its-controls):

```bash
python -m medseg_reg.study.search --config configs/searches/autodropout_small.yaml
```

A controller, a small causal transformer, writes one token for each of `p`, `size`, `stride`,
`repeat`, `rotate`, `shear_x`, `shear_y` and `share_c`, or whatever lists the file has (with several
layers in `architecture`, a pattern for each); a network is trained with the pattern, and its DICE
on the validation part rewards the controller by policy gradient. The parameters are those of the
layer, so `p` is a token beside those of the paper. The sizes of the published controller, its
learning rate, baseline and entropy weight, and the values of each token were not found; here they
are settings.

The paper's eighth token, `residual`, says whether the pattern goes to the residual branch as well.
It is no parameter of the layer, which sees one map and not the block around it, but a choice of
`places` in a network with residual blocks (MONAI's SegResNet, encoders of the ResNet family):

```yaml
parameters:
  regularization.architecture.0.places: [[after_norm], [after_norm, residual]]
```

`residual` is the branch before it is added, so the shortcut stays whole, and each place draws its
own position of the pattern. The paper's sentence can also be read as one mask on branch **and**
shortcut, and its code could not be read; that is `[after_norm, after_block]`, since a mask on the
sum is the same mask on both. A network without residual additions, as U-Net, has no such place: a
search that lists it is refused before anything runs.

![What each sampler has found against the number of trials](../samplers.png)

How fast it is, on **made** rewards over a space of 13824 patterns (noise of 0.01, the
best is worth 0.8; means of 20 searches; `python benchmarks/samplers.py`):

| sampler | trials | mean reward of the last quarter | reward of what was found |
|---|---|---|---|
| controller | 16 / 48 / 200 | .651 / .681 / .762 | .712 / .742 / .774 |
| random search | 16 / 48 / 200 | .630 / .630 / .621 | .705 / .731 / .744 |
| regularized evolution | 16 / 48 / 200 | .666 / .694 / .707 | .701 / .732 / .758 |

With some dozens of trials, which is what most studies can pay for, what the three find hardly
differs; the controller needs hundreds to be worth it, and real differences between patterns that
are larger than those between seeds.

On the phantom, with eight trials each (`trials=8`, a population of 4, one seed), the best DICE in
validation was .794 by the controller, .778 by evolution and .768 by random search. That is chance:
the controller drew its best in the first round, before it had learnt anything, and its mean (.721)
is the lowest (.735 random search, .738 evolution)."""

NOTES = {
    "auto_dropout": AUTO_DROPOUT,
    "corrdrop_channel": SELECTIVITY,
    "corrdrop_spatial": f"""\
{SELECTIVITY}

On the trained map the blocks of highest correlation are the empty background, which is alike
everywhere: at p = 0.25 the default drops a block of the body in 39 % of the passes and an empty one
in 7 % (the published rule both in 25 %). So the default takes more of what matters than p says; for
images with much background choose p with that in mind.

CorrDrop was published between convolution and normalization in the deeper stages of residual
networks. In a U-Net `after_block` of the deeper levels is nearest.

The published rate also rises over the first 200 calls of the layer, not epochs; here a schedule
does that.""",
    "drop_head": """\
```yaml
regularization:
  architecture:
    - {name: drop_head, p: 0.2, schedule: {name: v_shape, turn: 0.1}}
```

is Scheduled DropHead: the rate falls from 0.2 to 0 in the first tenth of the training, which should
be that of the learning rate's warm-up, and rises to 0.2 until the end. That `turn` is the warm-up,
and that both ends are equal, is known from summaries of the paper alone.""",
    "drop_key": """\
The published rate falls with the depth and ends with a few epochs without. A ramp over the places
does the first:

```yaml
regularization:
  architecture:
    - {name: drop_key, p: 0.1, depth_ramp: {first: 1.0, last: 0.0}}
```

Random numbers for every weight cost something where the weights are many: the training step of a
ViT (6 blocks of width 192, 196 patches, batch 4, one CPU core) took 1.3 times as long.

Where an attention is fused, as in timm's ViT, its weights are never computed; the layer then hides
the same keys by a mask. See [attention](../insertion.md#attention).""",
    "drop_path": """\
In a transformer, `residual` names the branches of its blocks too: two a block, or one layer for
both where the network has one module for both. Timm, segmentation-models-pytorch and MONAI's
SwinUNETR have a `drop_path_rate` of their own; where it is not 0, both rates act, and the report of
`insert` says so. MONAI's ViT and UNETR have none.""",
    "dropout": """\
Neighbouring pixels of a map are alike, so dropping single elements takes little information away.
Dropping channels ([spatial_dropout](spatial_dropout.md)) or blocks takes more.""",
    "guided_key_dropout": """\
Compare it with `beta: 0`, with [drop_key](drop_key.md) and with no dropout, over equal seeds; and
several `beta` at equal p as well as at an equal share of the attention dropped. That share is
`(guided_rates(u, p, beta) * u).mean()`: on scores u of a log-normal distribution (standard
deviation of the logarithm 1.5, 196 tokens, p = 0.2, p_max = 0.9) it is 0.03, 0.20, 0.63 and 0.67
for beta -1, 0, 1 and 2. In a network it is measured beside the rate: the report of `insert`, and
`placement.json` of a run, have it as `attention_dropped`. There it is that of new weights, whose
attention is nearly even; `insert` into a trained network tells that of its weights.

`exact: true` drops the same number of tokens in every sample, so that samples do not differ by how
much they lose. Every token keeps its rate, and `p_max` holds. The other way to a fixed number, the
largest of beta log u_j plus Gumbel noise, takes nearly the same attention away, but drops the most
attended tokens almost always whatever `p_max` says, and its rates are not known, which
[guided_residual_dropout](guided_residual_dropout.md) divides by.

Two more ways to drop a token are not offered, for they take the token's own features away: a
learned mask token in its place, and zeros in its place. At beta > 0 lesions, where the network has
learnt to look at them, would be erased from the image while the loss still asks for them; and zeros
in front of a layer normalization come out as its bias, alike for all. To train with tokens missing
use [patch_dropout](patch_dropout.md), which has the mask token, drops without regard to attention
and can protect the foreground (`protect_foreground`).

The attention of an untrained network is even, so a rate that rises with it is a natural schedule:

```yaml
regularization:
  architecture:
    - {name: guided_key_dropout, p: 0.2, beta: -1, schedule: {name: linear, duration: 0.3}}
```

No scores are learned. What helps, and whether anything does, is open: no result was published.

Timm's ViT and the DPT of segmentation-models-pytorch have a fused attention, whose weights are
never computed; the error says how to take it apart. It saves no time: all tokens are computed.""",
    "guided_residual_dropout": """\
It goes into MONAI's ViT and UNETR and, with an attention that is not fused, timm's ViT and DPT. In
the windows of a Swin transformer, and over the reduced keys of Segformer, tokens of a block get no
attention of their own: there [guided_key_dropout](guided_key_dropout.md) is the way.

The layer is a child of the module that hands the weights on, so no block is wrapped and no weight
changes its name.""",
    "gating_dropout": """\
```yaml
network:
  name: monai.UNETR
  img_size: 96
  experts: {count: 4, exchange: true}
regularization:
  architecture:
    - {name: gating_dropout, p: 0.3}
```

Checked with two processes over gloo: both toss the same coins; a step that takes part makes no
all-to-all where the others make three there and two back; answers and gradients with the exchange
are those without it. The exchange costs time and saves no memory, because every process holds all
weights: it is for those who want to measure what the paper measured.

The picture above shows the layer on a map that is not one of gates, with one sample and two virtual
machines; in a network it goes to `routing` alone.""",
    "heuristic_dropout": """\
At usual scales of a map the term k / V decides, and the entropy hardly counts. The table of the
paper agrees with k = 2, the value fixed in its code; its text finds 3 slightly better on average.

The method expects rectified maps: `between_convs` or `after_block`.""",
    "patch_dropout": """\
It goes into MONAI's ViT and UNETR, timm's ViT and the DPT of segmentation-models-pytorch: networks
whose blocks get the same tokens one after the other; and into MONAI's SwinUNETR and timm's Swin,
where windows lose rows and columns. The reduced keys of Segformer cannot leave tokens out one by
one. Timm's own `patch_drop_rate` gives
wrong maps in a network for segmentation, and `insert` refuses it.

An attention over N tokens of width d takes 2 N^2 d + 4 N d^2 multiplications, and the tests count
exactly that with k for N. At the sizes of medical slices the second term prevails, so the savings
are nearly proportional to p: a training step of a ViT (6 blocks of width 192, 196 patches, batch 4,
one CPU core) took 0.76 of its time at p = 0.25 and 0.51 at p = 0.5, where the formula says 0.72 and
0.46 for the blocks alone. UNETR's first encoder sees the image itself, so the network is never
blind at a dropped patch.

In a decoder with batch normalization, as that of DPT, mask tokens shift the statistics that
evaluation uses.

**Swin.** `insert` puts one layer at each resolution, `encoder.2.tokens` and so on, and gives the
kept patches alone to attention and MLP of each block. The tests compare this, in shifted windows
too, with the slow way: all patches computed, dropped ones hidden as keys. What is needed:

* Maps that are multiples of the window at every resolution: images of 224 with windows of 7, or
  128 with windows of 4 (`configs/bagls_small_swin.yaml`). Others are refused, since padded windows
  would lose other numbers of patches. So are Swin V2, whose attention counts its window itself, and
  torchvision's Swin.
* The relative position bias of these networks is one for the batch, so a pattern for each sample,
  as in the paper, is not possible without changing their code. Fewer patterns are drawn.
* Each resolution loses a share p of its own; a patch of a deep resolution may have lost more in
  those before. Begin with a p smaller than for ViT, or name one resolution alone.
* `torch.compile` breaks its graph at these layers, and gives the same.

With `vary` the number of tokens changes from pass to pass, which breaks the graph of
`torch.compile`.""",
    "token_merging": """\
```python
import torch
from monai.networks.nets import UNETR

from medseg_reg.insertion import insert

network = UNETR(
    1, 2, (64, 64), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3, spatial_dims=2
)
example = torch.rand(1, 1, 64, 64)
insert(network, "token_merging", "tokens", example=example, p=0.25, in_evaluation=True)
assert network.eval()(example).shape == (1, 2, 64, 64)
```

By default a regularizer, for training alone. With `in_evaluation=True` it makes a trained network
faster, also one that was trained without: build it, load its weights, insert. What that costs in
accuracy is to be measured on your data.

It goes where [patch_dropout](patch_dropout.md) goes: MONAI's ViT and UNETR, timm's ViT and the DPT
of segmentation-models-pytorch. The windows of a Swin transformer, the reduced keys of Segformer,
and blocks that get positions or need the whole grid are refused when the layer is placed; so is a
fused attention that takes no mask, unless `proportional=False`. A network takes one layer that
changes the number of its tokens.

The weights of a group in the attention are changed behind the softmax, or by timm's `attn_mask`;
that equal tokens may be merged without any change is tested to 1e-5.

Attention and MLP then take the operations of N - r tokens, which the tests count. Matching takes
about N^2 C / 4 multiplications more, and sorting: it pays for many tokens. Processor time over that
of the plain network, in one run (`python -m benchmarks.tokens --batch 1 --rounds 3`, a ViT of 6
blocks of width 192, one thread):

| | 196 patches | 1024 patches |
|---|---|---|
| training step, p = 0.25 | 1.0 | 0.83 |
| training step, p = 0.5 | 0.79 | 0.52 |
| evaluation, p = 0.25 | 1.27 | 0.91 |
| evaluation, p = 0.5 | 1.02 | 0.61 |

Networks that do the same work came out between 0.99 and 1.02 there. At the sizes of small slices it
saves no time in evaluation.""",
    "nsdropout": """\
![Test accuracy over the epochs, told the test label and without a mask](../nsdropout_leak.png)

Accuracy on scikit-learn's digits by epoch, mean of three seeds (`python
benchmarks/nsdropout_leak.py`, half a minute on one CPU core). The same networks, tested as
published, with the mask of the class that each test image really has, and clean, without a mask:

| trained with | tested | 5 | 10 | 20 | 40 | 60 |
|---|---|---|---|---|---|---|
| no dropout | clean | .33 | .80 | .90 | .92 | .92 |
| dropout, p = .2 | clean | .29 | .78 | .89 | .92 | .93 |
| NSDropout, p = .2 | as published | .47 | .84 | 1.00 | 1.00 | 1.00 |
| NSDropout, p = .2 | clean | .26 | .56 | .44 | .42 | .45 |
| NSDropout, p = .2 | clean, mean of all masks | .27 | .57 | .53 | .52 | .55 |
| NSDropout, p = .2 | by a wrong mask | .26 | .56 | .79 | .76 | .77 |
| random masks, p = .2 | as published | .73 | 1.00 | 1.00 | 1.00 | 1.00 |
| random masks, p = .2 | clean | .32 | .72 | .63 | .47 | .45 |

In the row "by a wrong mask" what counts as right is the class whose mask was taken.

As published nothing is wrong from the twentieth epoch on, because the mask says the answer: masks
drawn at random, one for each class, do as well, and with the mask of a wrong class the network
mostly answers that class. Clean, the network is far worse than one without any dropout, and after
the tenth epoch becomes worse while it trains: it learns to read the mask instead of the image. With
steps of 40 samples, where the masks change from step to step, p = .2 gives .90 clean and .86 with
the true mask: nothing to read, and no gain. So accuracies of the published inference cannot be
compared with those of another method. This is one small data set and one small network; that
NSDropout, tested clean, helps elsewhere is not excluded, but no such result was found.""",
    "tree_dropout": """\
![Errors over the training for 4, 16 and 64 experts](../tree_dropout.png)

The regression of the paper in the small: solid the error on new points, dashed that on the 40
points trained on (`python benchmarks/tree_dropout.py`).
With 64 experts the error on new points ends at 0.30 without dropout, and at 0.16 with p = 0.05 or
0.1, where the noise alone makes 0.09. The smallest error on the way, 0.14, is reached without it:
early stopping would do as well. With 4 experts dropout does harm, 0.32 against 0.21: a small tree
needs all of its leaves.

The picture above shows the layer on a map that is not one of gates; in a network it goes to
`tree_gates` alone.""",
    "input_dropout": """\
The paper's erosion and Canny edges are options of the [converters](../data.md).""",
}
"""What is worth knowing beside the docstring, by name of the method."""
