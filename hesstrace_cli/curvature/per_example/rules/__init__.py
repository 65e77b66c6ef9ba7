"""The squared norm of every example's gradient, operation by operation, from its output's gradient.

With rows x_l and gradients g_l at the positions l of one example, a weight's gradient is a sum of
outer products, and its norm

    || sum_l g_l x_l^T ||^2   =   sum_{l,l'} (g_l . g_l') (x_l . x_l')

for linear layers, convolutions (x_l the l-th patch) and embeddings; for norms and biases it is
that of a plain sum. Each rule reads what autograd has saved at the operation's node of the graph.

Source:
    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, for linear layers;
    Rochette et al., arXiv 1912.06015, for convolutions; the Gram form is
    Li, Tramèr, Liang, Hashimoto, arXiv 2110.05679.
"""
