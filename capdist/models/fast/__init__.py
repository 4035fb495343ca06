"""Nothing here changes a result; skip it to read the model.

Each module is a faster form of something simple. Values and gradients agree with the simple form up to rounding.
Tests in `tests/unit/models/fast/` compare the two in float64.

`packing`: the words of a batch without padding.
    Plain form: a loop over all positions of the padded batch, which ignores what it computes for padding.
    Proof: `test_packing.py::test_words_are_those_of_a_loop_over_positions_and_captions`, and for the whole decoder
    `tests/unit/models/test_decoder.py::test_whole_captions_and_gradients_are_those_of_the_plain_network`.
    Worth: a caption that has ended costs nothing. In a batch of 160 captions of Flickr8k, cut after 20 words, 44 % of
    the places are padding (computed from the lengths in `capdist/benchmark/workload.py`).

`step_products`: products that an LSTM applies at every word; their weights' gradients are computed once a batch.
    Plain form: `F.linear(inputs, weight, bias)` and `sigmoid(rows + shift) @ vector`, left to autograd.
    Proof: `test_step_products.py::test_gradients_are_autograds` and
    `test_step_products.py::test_a_decoder_trains_alike_with_the_plain_forms`.
    Worth: with the plain forms, a training step of the decoder takes 8 % more processor time. This was measured with
    the sizes of `docs/performance.md` on one core of an AMD EPYC with torch 2.14, both forms in turns.
    `CAPDIST_PLAIN_STEP_PRODUCTS=1 capdist benchmark train-step` measures the plain forms on your machine.

`norm_folding`: BatchNorm with stored statistics as part of the convolution before it.
    Plain form: the two layers one after the other, as torchvision and timm have them.
    Proof: `test_norm_folding.py::test_gradients_are_those_of_the_two_apart` and
    `test_norm_folding.py::test_only_certain_pairs_are_joined_and_every_network_stays_right`.
    Worth: the forward pass of a ResNet-50 takes 10 % more processor time with the two layers apart, measured in the
    same way. In training they keep one more activation for each pair
    (`test_norm_folding.py::test_outputs_of_convolutions_are_not_kept`). Together with the rest of the encoder pass, it
    brings a ResNet-50 from 72 % to 98 % of the machine's ceiling (`docs/performance.md`, `encode`).

`recomputation`: gradient checkpointing, only with `encoder.gradient_checkpointing`.
    Plain form: `network(pixel_values)`.
    Proof: `test_recomputation.py::test_gradients_and_statistics_are_the_same`.
    Worth: less than half of the memory for activations of a ResNet-18 that trains
    (`test_recomputation.py::test_less_is_kept`), for a second forward pass through the blocks that train.

Together with what the attention and the decoder do, a training step is 12 times as fast as the textbook's
(`docs/performance.md`, `train-step`).
"""
