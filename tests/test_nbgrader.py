"""A course with nbgrader's plain commands: release, submissions, grades, feedback, table, formgrader."""

import copy
import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from assignment import ROOT, define, items, mark, read
from bs4 import BeautifulSoup
from nbformat import NotebookNode

from dianlib.checks import grade, tasks
from dianlib.checks.registry import CHAPTERS

SCRIPTS = Path(sys.executable).parent
ESSAY_POINTS = {
    slug: sum(mark(c, "points") or 0 for c in read("solutions", slug).cells if c.cell_type == "markdown")
    for slug in CHAPTERS
}
POINTS = {slug: sum(t.points for t in tasks().values() if t.chapter == slug) for slug in CHAPTERS}

# One known mistake for each task: its id, and an answer that makes it.
MISTAKES = {
    "metrics.confusion_matrix": (
        "metrics-precision-recall-swapped",
        """
def confusion_matrix(predictions, targets, n_classes):
    cells = predictions * n_classes + targets
    return torch.bincount(cells, minlength=n_classes**2).reshape(n_classes, n_classes)
""",
    ),
    "metrics.accuracy": (
        "metrics-percent",
        """
def accuracy(confusion):
    return 100 * confusion.diagonal().sum().item() / confusion.sum().item()
""",
    ),
    "metrics.precision": (
        "metrics-precision-recall-swapped",
        """
def precision(confusion):
    return confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)
""",
    ),
    "metrics.recall": (
        "metrics-zero-division",
        """
def recall(confusion):
    return confusion.diagonal() / confusion.sum(dim=1)
""",
    ),
    "metrics.f1": (
        "metrics-f1-other-mean",
        """
def f1(confusion):
    hits = confusion.diagonal()
    p, r = hits / confusion.sum(dim=0).clamp(min=1), hits / confusion.sum(dim=1).clamp(min=1)
    return (p + r) / 2
""",
    ),
    "metrics.macro_f1": (
        "metrics-f1-of-macro-averages",
        """
def macro_f1(confusion):
    hits = confusion.diagonal()
    p = (hits / confusion.sum(dim=0).clamp(min=1)).mean().item()
    r = (hits / confusion.sum(dim=1).clamp(min=1)).mean().item()
    return 2 * p * r / (p + r)
""",
    ),
    "metrics.evaluate": (
        "metrics-len-loader-divisor",
        """
def evaluate(model, batches, n_classes):
    model.eval()
    shares, confusion = [], torch.zeros(n_classes, n_classes)
    for inputs, targets in batches:
        predictions = model(inputs).argmax(dim=1)
        shares.append((predictions == targets).float().mean().item())
        for t, p in zip(targets, predictions):
            confusion[t, p] += 1
    hits, called, there = confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)
    return {
        "accuracy": sum(shares) / len(shares),
        "precision": (hits / called.clamp(min=1)).mean().item(),
        "recall": (hits / there.clamp(min=1)).mean().item(),
        "f1": (2 * hits / (called + there).clamp(min=1)).mean().item(),
    }
""",
    ),
    "metrics.wilson_interval": (
        "metrics-wald-interval",
        """
def wilson_interval(n_correct, n_total, z=1.96):
    p = n_correct / n_total
    half_width = z * math.sqrt(p * (1 - p) / n_total)
    return p - half_width, p + half_width
""",
    ),
    "metrics.grade_this": (
        "test-of-the-range-only",
        """
def examine(macro_f1):
    return 0 <= macro_f1(torch.tensor([[3, 1], [1, 5]])) <= 1
""",
    ),
    "metrics.read_a_table": (
        "table-claim-believed",
        'answers = {"denominator": 10_000, "weight": 4, "lowest": 0.9822, "highest": 0.987}',
    ),
    "mlp.linear": (
        "linear-bias-missing",
        """
def linear(x, weight, bias):
    return x @ weight.T
""",
    ),
    "mlp.relu": (
        "relu-leaky",
        """
def relu(x):
    return torch.where(x > 0, x, 0.01 * x)
""",
    ),
    "mlp.softmax": (
        "softmax-no-max-shift",
        """
def softmax(logits):
    exponentials = logits.exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)
""",
    ),
    "mlp.cross_entropy": (
        "ce-sign",
        """
def cross_entropy(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    logarithms = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return logarithms[range(len(targets)), targets].mean()
""",
    ),
    "mlp.cross_entropy_gradient": (
        "ce-gradient-not-averaged",
        """
def cross_entropy_gradient(logits, targets):
    exponentials = (logits - logits.max(dim=1, keepdim=True).values).exp()
    gradient = exponentials / exponentials.sum(dim=1, keepdim=True)
    gradient[range(len(targets)), targets] -= 1
    return gradient
""",
    ),
    "mlp.MLP": (
        "net-relu-on-logits",
        """
class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x
""",
    ),
    "mlp.sgd_step": (
        "sgd-uphill",
        """
def sgd_step(parameters, lr):
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter += lr * parameter.grad
""",
    ),
    "mlp.train_epoch": (
        "train-missing-zero-grad",
        """
def train_epoch(model, batches, optimizer, loss_fn):
    model.train()
    total, n_samples = 0.0, 0
    for inputs, targets in batches:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(inputs)
        n_samples += len(inputs)
    return total / n_samples
""",
    ),
    "mlp.grade_this": (
        "test-only-small-scores",
        """
def examine(softmax):
    z = torch.tensor([[1.0, 2.0, 5.0], [3.0, 1.0, 4.0]])
    return torch.allclose(softmax(z.log()), z / z.sum(dim=1, keepdim=True), atol=1e-4)
""",
    ),
    "mlp.read_logs": (
        "log-biases-forgotten",
        """
answers = {"constant answer": 0.1135, "nan on mnist": 0.098, "first loss": math.log(10)}
answers |= {"floor for 100 classes": math.log(1 + 99 / math.e), "steps": 93_800, "parameters": 135_680}
""",
    ),
    "search.search_space": (
        "space-rate-not-logarithmic",
        """
def search_space(trial):
    n_layers = trial.suggest_int("n_layers", 1, 4)
    hidden = [trial.suggest_categorical(f"width_{i + 1}", [32, 64, 128, 256]) for i in range(n_layers)]
    lr = trial.suggest_float("lr", 1e-4, 1e-1)
    batch_size = trial.suggest_categorical("batch_size", [32, 64, 128, 256])
    return {"hidden": hidden, "lr": lr, "batch_size": batch_size}
""",
    ),
    "search.set_of_depths": (
        "depths-biases-forgotten",
        """
def set_of_depths(depths, budget, n_in, n_out):
    networks = []
    for depth in depths:
        width = 1
        while n_in * (width + 1) + (depth - 1) * (width + 1) ** 2 + (width + 1) * n_out <= budget:
            width += 1
        networks.append([n_in, *[width] * depth, n_out])
    return networks
""",
    ),
    "search.choose": (
        "hp-test-set-as-objective",
        """
def choose(results):
    means = [sum(result["test"]) / len(result["test"]) for result in results]
    return max(range(len(results)), key=lambda i: (means[i], -results[i]["parameters"]))
""",
    ),
    "search.paired_interval": (
        "paired-as-if-independent",
        """
def paired_interval(first, second, z=1.96):
    p, q = first.double().mean().item(), second.double().mean().item()
    half_width = z * math.sqrt((p * (1 - p) + q * (1 - q)) / len(first))
    return p - q - half_width, p - q + half_width
""",
    ),
    "search.expected_best": (
        "best-of-everything",
        """
def expected_best(values, k):
    return max(values)
""",
    ),
    "search.audit_table": (
        "audit-rounding-forgotten",
        """
def audit_table(values, n_images, batch_size, decimals=6):
    n_full, n_rest = divmod(n_images, batch_size)
    of_means = (n_full + 1) * math.lcm(batch_size, n_rest) if n_rest else n_images

    def all_fit(d):
        return all(abs(value * d - round(value * d)) < 1e-6 for value in values)

    return {
        "images": all_fit(n_images),
        "batch means": all_fit(of_means),
        "last batch dropped": all_fit(n_full * batch_size),
    }
""",
    ),
    "search.grade_this": (
        "test-of-the-report-only",
        """
def examine(protocol):
    results = [
        {"validation": [0.93, 0.96, 0.95], "test": [0.94, 0.90, 0.92]},
        {"validation": [0.94, 0.93, 0.95], "test": [0.95, 0.96, 0.94]},
        {"validation": [0.90, 0.98, 0.91], "test": [0.91, 0.92, 0.93]},
        {"validation": [0.95, 0.92, 0.90], "test": [0.93, 0.95, 0.93]},
    ]
    chosen, reported = protocol(results)
    return abs(float(reported) - sum(results[int(chosen)]["test"]) / 3) < 1e-6
""",
    ),
    "search.read_a_study": (
        "hp-space-key-mismatch",
        """
answers = {
    "networks": 10,
    "trials by the sampler": 0,
    "denominator": 10_016,
    "standard errors": 1.7,
    "updates": 1_880,
    "parameters": 333_450,
}
""",
    ),
    "rnn.rnn_cell": (
        "rnn-weight-not-transposed",
        """
def rnn_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    return torch.tanh(x @ weight_ih.T + bias_ih + h @ weight_hh + bias_hh)
""",
    ),
    "rnn.unroll": (
        "rnn-h0-ignored",
        """
def unroll(xs, h0, weight_ih, weight_hh, bias_ih, bias_hh):
    h, states = torch.zeros_like(h0), []
    for x in xs.unbind(dim=1):
        h = torch.tanh(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)
        states.append(h)
    return torch.stack(states, dim=1)
""",
    ),
    "rnn.bptt_gradient": (
        "bptt-slope-missing",
        """
def bptt_gradient(xs, h0, weight_ih, weight_hh, bias_ih, bias_hh, grad_last):
    states = [h0]
    for x in xs.unbind(dim=1):
        states.append(torch.tanh(x @ weight_ih.T + bias_ih + states[-1] @ weight_hh.T + bias_hh))
    grad_ih, grad_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
    grad_bias, grad_h = torch.zeros_like(bias_hh), grad_last
    for t in reversed(range(xs.shape[1])):
        grad_ih += grad_h.T @ xs[:, t]
        grad_hh += grad_h.T @ states[t]
        grad_bias += grad_h.sum(dim=0)
        grad_h = grad_h @ weight_hh
    return grad_ih, grad_hh, grad_bias
""",
    ),
    "rnn.gradient_by_distance": (
        "distance-first-step-first",
        """
def gradient_by_distance(model, xs):
    inputs = xs.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    return gradient.norm(dim=(0, 2))
""",
    ),
    "rnn.clip_grad_norm": (
        "clip-each-tensor",
        """
def clip_grad_norm(parameters, max_norm):
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
    for gradient in gradients:
        if gradient.norm() > max_norm:
            gradient *= max_norm / gradient.norm()
    return norm
""",
    ),
    "rnn.orthogonal": (
        "orthogonal-not-normed",
        """
def orthogonal(matrix):
    columns = []
    for column in matrix.T:
        for earlier in columns:
            column = column - (column @ earlier) / (earlier @ earlier) * earlier
        columns.append(column)
    return torch.stack(columns, dim=1)
""",
    ),
    "rnn.RNNClassifier": (
        "rnn-image-as-one-step",
        """
class RNNClassifier(nn.Module):
    def __init__(self, input_size, hidden_size, n_classes):
        super().__init__()
        self.from_input = nn.Linear(input_size, hidden_size)
        self.from_state = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, xs):
        h = torch.zeros(len(xs), self.from_state.in_features)
        return self.output(torch.tanh(self.from_input(xs[:, -1]) + self.from_state(h)))
""",
    ),
    "rnn.grade_this": (
        "test-accepts-everything",
        """
def examine(last_state):
    xs, square = torch.ones(2, 4, 3), torch.eye(3)
    return last_state(xs, square, square, torch.zeros(3)).shape == (2, 3)
""",
    ),
    "rnn.read_claims": (
        "claims-steps-between",
        """
answers = {
    "time steps": 1,
    "parameters": 21514,
    "answers given": 2,
    "reach": 0.8**28,
    "clip factor": 0.125,
    "rate divided by": None,
}
""",
    ),
    "lstm.lstm_cell": (
        "lstm-gate-order",
        """
def lstm_cell(x, state, weight_ih, weight_hh, bias_ih, bias_hh):
    h, c = state
    i, f, o, g = (x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
""",
    ),
    "lstm.gru_cell": (
        "gru-update-swapped",
        """
def gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    r_x, z_x, n_x = (x @ weight_ih.T + bias_ih).chunk(3, dim=1)
    r_h, z_h, n_h = (h @ weight_hh.T + bias_hh).chunk(3, dim=1)
    update = (z_x + z_h).sigmoid()
    candidate = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (1 - update) * h + update * candidate
""",
    ),
    "lstm.LSTMClassifier": (
        "loss-double-softmax",
        """
class LSTMClassifier(nn.Module):
    def __init__(self, input_size, hidden_size, n_classes):
        super().__init__()
        self.from_input = nn.Linear(input_size, 4 * hidden_size)
        self.from_state = nn.Linear(hidden_size, 4 * hidden_size)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, x):
        h = c = x.new_zeros(len(x), self.from_state.in_features)
        for step in x.unbind(1):
            i, f, g, o = (self.from_input(step) + self.from_state(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.output(h).softmax(dim=1)
""",
    ),
    "lstm.open_forget_gates": (
        "lstm-forget-bias-twice",
        """
def open_forget_gates(model, value):
    size = model.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("bias"):
                parameter[size : 2 * size] = value
""",
    ),
    "lstm.gates": (
        "lstm-state-not-carried",
        """
def gates(xs, weight_ih, weight_hh, bias_ih, bias_hh):
    i, f, g, o = (xs @ weight_ih.T + bias_ih + bias_hh).chunk(4, dim=2)
    return {"input": i.sigmoid(), "forget": f.sigmoid(), "output": o.sigmoid(), "candidate": g.tanh()}
""",
    ),
    "lstm.to_torch_order": (
        "lstm-order-inverse",
        """
def to_torch_order(weight, order):
    blocks = weight.chunk(4)
    return torch.cat([blocks["ifgo".index(name)] for name in order])
""",
    ),
    "lstm.hidden_size_at_budget": (
        "lstm-one-bias-counted",
        """
def hidden_size_at_budget(kind, input_size, budget):
    blocks = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    size = 1
    while blocks * size * (input_size + size + 1) <= budget:
        size += 1
    return size - 1
""",
    ),
    "lstm.grade_this": (
        "test-of-h-only",
        """
def examine(lstm_cell):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 2), (3, 4), (3, 4), (16, 2), (16, 4), (16,), (16,)]
    x, h, c, *weights = (torch.randn(shape, generator=generator) for shape in shapes)
    wanted, _ = torch.lstm_cell(x, (h, 3 * c), *weights)
    return torch.allclose(lstm_cell(x, (h, 3 * c), *weights)[0], wanted, atol=1e-4)
""",
    ),
    "lstm.read_a_memory": (
        "memory-divided-not-raised",
        """
answers = {
    "kept": 0.5 / 10,
    "gate at bias 1": None,
    "half-life": None,
    "bias for 200": None,
    "guessing": 1 / 8,
    "more parameters": 4,
}
""",
    ),
    "seq2seq.padding_mask": (
        "mask-inverted",
        """
def padding_mask(tokens, pad):
    return tokens == pad
""",
    ),
    "seq2seq.shift_right": (
        "tf-first-token-wrong",
        """
def shift_right(target, bos):
    return target.roll(1, dims=1)
""",
    ),
    "seq2seq.sequence_loss": (
        "loss-mean-over-padded-length",
        """
def sequence_loss(logits, targets, pad):
    prices = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (prices * (targets != pad)).mean()
""",
    ),
    "seq2seq.Encoder": (
        "enc-reads-padding",
        """
class Encoder(nn.Module):
    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.gru = nn.GRU(hidden_size, hidden_size // 2, batch_first=True, bidirectional=True)

    def forward(self, source, lengths):
        states, ends = self.gru(self.embedding(source))
        return states, torch.cat([ends[0], ends[1]], dim=-1)
""",
    ),
    "seq2seq.additive_attention": (
        "attn-pads-attended",
        """
def additive_attention(query, keys, w_query, w_key, v, mask=None):
    weights = (torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v).softmax(dim=-1)
    return (weights.unsqueeze(-1) * keys).sum(dim=1), weights
""",
    ),
    "seq2seq.decoder_step": (
        "attn-pads-attended",
        """
def decoder_step(decoder, token, state, keys, mask):
    context, weights = decoder.attend(state, keys)
    state = decoder.cell(torch.cat([decoder.embedding(token), context], dim=-1), state)
    return decoder.readout(torch.cat([state, context], dim=-1)), state, weights
""",
    ),
    "seq2seq.greedy_decode": (
        "decode-stops-too-early",
        """
def greedy_decode(step, start, eos, max_length):
    token, columns = start, []
    for _ in range(max_length):
        token = step(token).argmax(dim=-1)
        columns.append(token)
        if (token == eos).any():
            break
    return torch.stack(columns, dim=1)
""",
    ),
    "seq2seq.grade_this": (
        "test-of-row-sums-only",
        """
def examine(additive_attention):
    keys, matrix = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[0.1, 0.2], [-0.3, 0.4]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    _, weights = additive_attention(keys[:, 0], keys, matrix, matrix, torch.ones(2), mask)
    return torch.allclose(weights.sum(dim=-1), torch.ones(2), atol=1e-4)
""",
    ),
    "seq2seq.read_a_log": (
        "token-accuracy-for-sentences",
        """
answers = {"first loss": math.log(36), "loss per token": 2.1, "weight on padding": 0.7}
answers |= {"sentences right": 0.98, "decoder calls": 10}
""",
    ),
    "attention.attention_one_query": (
        "sdpa-no-scale",
        """
def attention_one_query(query, keys, values):
    return torch.softmax(keys @ query, dim=0) @ values
""",
    ),
    "attention.self_attention": (
        "sdpa-softmax-wrong-axis",
        """
def self_attention(x, w_query, w_key, w_value):
    query, key, value = x @ w_query, x @ w_key, x @ w_value
    weights = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]), dim=-2)
    return weights @ value, weights
""",
    ),
    "attention.scaled_dot_product_attention": (
        "mask-after-softmax",
        """
def scaled_dot_product_attention(query, key, value, mask=None):
    weights = torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]), dim=-1)
    if mask is not None:
        weights = weights * mask
    return weights @ value, weights
""",
    ),
    "attention.causal_mask": (
        "mask-causal-top-left",
        """
def causal_mask(n_queries, n_keys=None):
    return torch.ones(n_queries, n_keys or n_queries).tril().bool()
""",
    ),
    "attention.padding_mask": (
        "mask-polarity",
        """
def padding_mask(lengths, max_length):
    return (torch.arange(max_length) >= lengths[:, None])[:, None, None]
""",
    ),
    "attention.translator_masks": (
        "cross-mask-from-target",
        """
def translator_masks(source_lengths, target_lengths, n_source, n_target):
    of_source, of_target = (
        (torch.arange(width) < lengths[:, None])[:, None, None]
        for lengths, width in ((source_lengths, n_source), (target_lengths, n_target))
    )
    return of_source, of_target & torch.ones(n_target, n_target).tril().bool(), of_target
""",
    ),
    "attention.grade_this": (
        "test-without-a-mask",
        """
def examine(scaled_dot_product_attention):
    query, key, value = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4, 3)
    output, weights = scaled_dot_product_attention(query, key, value)
    wanted = torch.softmax(query @ key.T / math.sqrt(3), dim=-1)
    return torch.allclose(weights, wanted, atol=1e-4) and torch.allclose(output, wanted @ value, atol=1e-4)
""",
    ),
    "attention.read_a_heat_map": (
        "divisor-expected-not-read",
        """
answers = {"standard deviation": 8, "divisor": 8, "mean row sum": 0.75}
answers |= {"hidden weight": 0.25, "open places": 18}
""",
    ),
    "multihead.split_heads": (
        "mha-split-by-view",
        """
def split_heads(x, n_heads):
    return x.view(x.shape[0], n_heads, x.shape[1], -1)
""",
    ),
    "multihead.merge_heads": (
        "mha-merge-transpose-last-two",
        """
def merge_heads(x):
    batch, n_heads, length, head_dim = x.shape
    return x.transpose(-1, -2).contiguous().view(batch, length, n_heads * head_dim)
""",
    ),
    "multihead.parameter_count": (
        "heads-are-more-weights",
        """
def parameter_count(d_model, n_heads):
    return n_heads * 4 * (d_model * d_model + d_model)
""",
    ),
    "multihead.MultiHeadAttention": (
        "mha-shared-small-projection",
        """
class MultiHeadAttention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads, d = n_heads, d_model // n_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.o_proj = nn.Linear(d_model, d_model)

    def cut(self, x):
        return x.reshape(x.shape[0], x.shape[1], self.n_heads, -1).transpose(1, 2)

    def forward(self, query, key, value, mask=None):
        q, k, v = self.q_proj(self.cut(query)), self.k_proj(self.cut(key)), self.v_proj(self.cut(value))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        weights = scores.softmax(dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), weights
""",
    ),
    "multihead.head_contributions": (
        "mha-output-block-rows",
        """
def head_contributions(heads, o_weight):
    blocks = o_weight.split(heads.shape[3], dim=0)
    return torch.stack([heads[:, h] @ block for h, block in enumerate(blocks)], dim=1)
""",
    ),
    "multihead.head_distances": (
        "distance-of-mean-maps",
        """
def head_distances(weights):
    maps = weights.mean(dim=0)
    return (maps[:, None] - maps[None]).abs().sum(dim=-1).mean(dim=-1) / 2
""",
    ),
    "multihead.grade_this": (
        "mha-no-oracle",
        """
def examine(multi_head_attention):
    x, w = torch.rand(2, 4, 6), torch.rand(6, 6)
    return multi_head_attention(x, w, w, w, w, 3).shape == x.shape
""",
    ),
    "multihead.read_claims": (
        "mha-full-width-heads",
        """
answers = {"weights of the class": 3 * 64**2, "weights of the paper": 3 * 6 * 384**2, "heads that change": 1}
answers |= {"heads that should change": 6, "too flat": 6**0.5, "mean of a sharp head": 1 / 6, "full width": 6}
""",
    ),
    "positions.sinusoidal": (
        "pe-halves",
        """
def sinusoidal(length, d_model):
    angles = torch.arange(length).unsqueeze(1) / 10000 ** (torch.arange(0, d_model, 2) / d_model)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
""",
    ),
    "positions.rope_frequencies": (
        "rope-frequency-wrong",
        """
def rope_frequencies(head_dim, base=10000.0):
    return base ** -(torch.arange(head_dim // 2) / head_dim)
""",
    ),
    "positions.apply_rope": (
        "rope-half-split",
        """
def apply_rope(x, positions, base=10000.0):
    d = x.shape[-1]
    angles = positions.unsqueeze(1) / base ** (torch.arange(0, d, 2) / d)
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
""",
    ),
    "positions.rotary_attention": (
        "rope-applied-to-embeddings",
        """
def rotary_attention(x, w_q, w_k, w_v, n_heads):
    d = x.shape[-1]
    angles = torch.arange(x.shape[1]).unsqueeze(1) / 10000 ** (torch.arange(0, d, 2) / d)
    u, v = x[..., 0::2], x[..., 1::2]
    u, v = u * angles.cos() - v * angles.sin(), u * angles.sin() + v * angles.cos()
    x = torch.stack([u, v], dim=-1).flatten(-2)
    q, k, v = ((x @ w).unflatten(-1, (n_heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights
""",
    ),
    "positions.to_neighbours": (
        "rope-reorder-across-heads",
        """
def to_neighbours(weight, n_heads):
    first, second = weight.chunk(2)
    return torch.stack([first, second], dim=1).flatten(0, 1)
""",
    ),
    "positions.alibi_bias": (
        "alibi-aligned-to-the-start",
        """
def alibi_bias(n_heads, n_queries, n_keys):
    slopes = 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads)
    distance = (torch.arange(n_queries).unsqueeze(1) - torch.arange(n_keys)).abs()
    return -slopes[:, None, None] * distance
""",
    ),
    "positions.relative_scores": (
        "relative-direction",
        """
def relative_scores(query, key, table):
    n_queries, n_keys, reach = query.shape[-2], key.shape[-2], len(table) // 2
    places = torch.arange(n_keys)
    distance = places[n_keys - n_queries :].unsqueeze(1) - places
    rows = table[distance.clamp(-reach, reach) + reach]
    by_distance = (query.unsqueeze(-2) * rows).sum(dim=-1)
    return (query @ key.transpose(-2, -1) + by_distance) / math.sqrt(query.shape[-1])
""",
    ),
    "positions.grade_this": (
        "test-of-lengths-only",
        """
def examine(apply_rope):
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    return torch.allclose(apply_rope(x, torch.tensor([5, 0, 9, 2])).norm(dim=-1), x.norm(dim=-1), atol=1e-3)
""",
    ),
    "positions.read_claims": (
        "claims-last-pair",
        """
answers = {
    "slowest wavelength": 2 * math.pi * 10000,
    "score of (5, 2)": math.cos(3),
    "score of (105, 102)": 1.7,
    "table": 4096 * 32,
    "extra work": 1 / 512,
    "weight ratio": None,
}
""",
    ),
    "grouped_query.cache_bytes": (
        "kv-bytes-of-keys-only",
        """
def cache_bytes(n_layers, n_kv_heads, head_dim, length, batch, bytes_per_value):
    return n_layers * n_kv_heads * head_dim * length * batch * bytes_per_value
""",
    ),
    "grouped_query.repeat_kv": (
        "gqa-tiled-grouping",
        """
def repeat_kv(x, n_repeats):
    return x.repeat(1, n_repeats, 1, 1)
""",
    ),
    "grouped_query.GroupedQueryAttention": (
        "gqa-sums-in-group",
        """
class GroupedQueryAttention(nn.Module):
    def __init__(self, d_model, n_heads, n_kv_heads):
        super().__init__()
        self.h, self.g, self.d = n_heads, n_kv_heads, d_model // n_heads
        self.q_proj, self.o_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.d)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.d)

    def forward(self, x, mask=None, cache=None):
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.g, self.h // self.g, self.d).sum(3).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.g, self.d).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.g, self.d).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        scores = q @ k.mT / self.d**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e9)
        out = (scores.softmax(-1) @ v).repeat_interleave(self.h // self.g, 1)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))
""",
    ),
    "grouped_query.KVCache": (
        "kv-bytes-size-of-a-number",
        """
class KVCache:
    def __init__(self):
        self.keys, self.values = [], []

    def append(self, key, value):
        self.keys.append(key)
        self.values.append(value)
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)

    def length(self):
        return sum(key.shape[2] for key in self.keys)

    def nbytes(self):
        return 4 * sum(part.numel() for part in self.keys + self.values)
""",
    ),
    "grouped_query.mha_to_gqa": (
        "gqa-group-size-for-number",
        """
def mha_to_gqa(k_weight, n_heads, n_kv_heads):
    d = k_weight.shape[0] // n_heads
    return k_weight.view(-1, n_kv_heads, d, k_weight.shape[1]).mean(1).flatten(0, 1)
""",
    ),
    "grouped_query.decode": (
        "kv-position-restarts",
        """
def decode(model, prompt, n_new):
    cache = model.new_cache()
    tokens = new = prompt
    for _ in range(n_new):
        n = new.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril() if n > 1 else None
        new = model(new, torch.arange(n), mask, cache)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], 1)
    return tokens
""",
    ),
    "grouped_query.grade_this": (
        "test-with-square-of-groups",
        """
def examine(grouped_attention):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 5, generator=generator)
    key, value = torch.randn(2, 2, 2, 6, 5, generator=generator)
    wanted = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return torch.allclose(grouped_attention(query, key, value), wanted, atol=1e-4)
""",
    ),
    "grouped_query.read_a_claim": (
        "gqa-sums-in-group",
        """
answers = {
    "patterns": 4,
    "ceiling": 0.5625,
    "key-value heads": 1,
    "bytes per token": 131072,
    "tokens": 65536,
    "tokens with 32": 16384,
    "scores": 32,
}
""",
    ),
}

# Right for two classes that both occur, and for any number of them: the corner cases are missing.
HALF_RIGHT = """
def f1(confusion):
    hits = confusion.diagonal()
    p, r = hits / confusion.sum(dim=0), hits / confusion.sum(dim=1)
    return 2 * p * r / (p + r)
"""


def submission(slug: str, changed: dict[str, str]) -> NotebookNode:
    """Fill in a release as a student would: the solution's answers, or others for tasks in ``changed``."""
    notebook = copy.deepcopy(read("exercises", slug))
    solved = {cell.id: cell.source for cell in read("solutions", slug).cells}
    for cell in notebook.cells:
        if mark(cell, "solution"):
            cell.source = solved[cell.id]
    for item in items(notebook):
        item.answer.source = changed.get(item.task, item.answer.source).strip()
    return notebook


BUTTONS = """
import sys
from pathlib import Path
from dianlib.grading.driver import Course

course = Course(Path.cwd())
for slug in sys.argv[1:]:
    done = [course.api.generate_assignment(slug)]
    done += [course.api.autograde(slug, student) for student in course.submitted(slug)]
    done += [course.api.generate_feedback(slug)]
    assert all(result["success"] for result in done), done
"""


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A home without anybody's settings; nbgrader starts further programs, so its folder is on PATH."""
    home = str(tmp_path_factory.mktemp("home"))
    progress = str(Path(home, "progress.json"))
    path = os.pathsep.join([str(SCRIPTS), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HOME": home, "DIANLIB_PROGRESS": progress}


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A course with its releases made, and all submissions graded and commented."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copy(ROOT / "nbgrader_config.py", folder)
    for slug in CHAPTERS:
        (folder / "solutions" / slug).mkdir(parents=True)
        shutil.copy(ROOT / "solutions" / slug / f"{slug}.ipynb", folder / "solutions" / slug)

    def run(command: list[str]) -> None:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def nbgrader(*arguments: str) -> None:
        run([str(SCRIPTS / "nbgrader"), *arguments])

    for slug in CHAPTERS:
        handed_in = {
            "perfect": submission(slug, {}),
            "blank": read("exercises", slug),
            "mistaken": submission(slug, {task: source for task, (_, source) in MISTAKES.items()}),
        }
        if slug == "metrics":
            handed_in["partial"] = submission(slug, {"metrics.f1": HALF_RIGHT})
        for student, notebook in handed_in.items():
            path = folder / "submitted" / student / slug / f"{slug}.ipynb"
            path.parent.mkdir(parents=True)
            nbformat.write(notebook, path)
    # Some as at a terminal, with a program for each step; the others as formgrader's buttons do it, in one
    # process, which takes minutes less.
    for slug in CHAPTERS[:2]:
        for step in ("generate_assignment", "autograde", "generate_feedback"):
            nbgrader(step, slug)
    run([sys.executable, "-c", BUTTONS, *CHAPTERS[2:]])
    nbgrader("export")
    return folder


def scores(course: Path, student: str, slug: str) -> dict[str, float | None]:
    """Return the points of a submission by task, as the gradebook has them."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        notebook = gradebook.find_submission_notebook(slug, slug, student)
        by_cell = {g.name: g.score if g.auto_score is not None else None for g in notebook.grades}
    return {i.task: by_cell[mark(i.check, "grade_id")] for i in items(read("solutions", slug))}


# ----- the release ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_release_in_the_repository_is_what_nbgrader_makes(course: Path, slug: str) -> None:
    made = nbformat.read(course / "exercises" / slug / f"{slug}.ipynb", as_version=4)
    kept = read("exercises", slug)
    advice = f"run `nbgrader generate_assignment {slug} --force` and commit exercises/{slug}"
    assert made.metadata == kept.metadata, advice
    assert [cell.id for cell in made.cells] == [cell.id for cell in kept.cells], advice
    for new, old in zip(made.cells, kept.cells, strict=True):
        assert (new.cell_type, new.source, new.metadata) == (old.cell_type, old.source, old.metadata), advice
    assert [path.name for path in (course / "exercises" / slug).iterdir()] == [f"{slug}.ipynb"]


def test_nbgrader_validates_the_solutions(course: Path, environment: dict[str, str]) -> None:
    command = [
        str(SCRIPTS / "nbgrader"),
        "validate",
        *(f"solutions/{slug}/{slug}.ipynb" for slug in CHAPTERS),
    ]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["Success! Your notebook passes all the tests."] * len(CHAPTERS)


# ----- grades --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CHAPTERS)
def test_perfect_gets_everything_and_blank_nothing(course: Path, slug: str) -> None:
    full = {item.task: float(tasks()[item.task].points) for item in items(read("solutions", slug))}
    assert scores(course, "perfect", slug) == full
    assert scores(course, "blank", slug) == dict.fromkeys(full, 0.0)


def test_half_an_answer_gets_part_of_its_points(course: Path) -> None:
    item = next(i for i in items(read("solutions", "metrics")) if i.task == "metrics.f1")
    candidate = define(["import torch", HALF_RIGHT])["f1"]
    expected = grade(item.task, candidate, item.seed or 0)
    assert 0 < expected.points < expected.max_points
    found = scores(course, "partial", "metrics")
    assert found["metrics.f1"] == expected.points
    # The answers that build on f1 lose their corner cases as well, and nothing else is lost.
    lost = {task for task, score in found.items() if score != tasks()[task].points}
    assert lost == {"metrics.f1", "metrics.macro_f1", "metrics.evaluate"}


@pytest.mark.parametrize("slug", CHAPTERS)
def test_every_mistake_costs_points_and_the_feedback_names_it(course: Path, slug: str) -> None:
    found = scores(course, "mistaken", slug)
    page = BeautifulSoup(
        (course / "feedback" / "mistaken" / slug / f"{slug}.html").read_text(), "html.parser"
    ).get_text()
    for task in found:
        mistake, _ = MISTAKES[task]
        assert mistake in tasks()[task].faults
        assert 0 <= (found[task] or 0) < tasks()[task].points, task
        reports = re.findall(
            rf"^{re.escape(task)}: not right yet.*?^-?\d+(?:\.\d+)?$", page, re.MULTILINE | re.DOTALL
        )
        named = set(re.findall(r"^  \[([\w-]+)\]", "\n".join(reports), re.MULTILINE))
        assert named == {mistake}, (task, named)


def test_a_graders_run_leaves_the_graders_own_progress_alone(
    course: Path, environment: dict[str, str]
) -> None:
    assert (course / "gradebook.db").is_file()
    assert not Path(environment["DIANLIB_PROGRESS"]).exists()


def test_the_exported_table_has_the_right_totals(course: Path) -> None:
    with (course / "grades.csv").open() as table:
        rows = {(row["student_id"], row["assignment"]): row for row in csv.DictReader(table)}
    for slug in CHAPTERS:
        for student in ("perfect", "blank", "mistaken", "partial"):
            row = rows[student, slug]
            assert float(row["max_score"]) == POINTS[slug] + ESSAY_POINTS[slug]
            if student == "partial" and slug != "metrics":  # not handed in
                assert float(row["score"]) == 0
                continue
            score = float(row["score"])
            assert score == pytest.approx(sum(scores(course, student, slug).values()))
            if student in ("perfect", "blank"):
                assert score == (POINTS[slug] if student == "perfect" else 0)
            else:
                assert 0 < score < POINTS[slug]


def test_an_essay_waits_for_a_person_unless_it_is_blank(course: Path) -> None:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        waiting = {
            student: gradebook.find_submission_notebook("mlp", "mlp", student).needs_manual_grade
            for student in ("perfect", "blank")
        }
    assert waiting == {"perfect": True, "blank": False}


# ----- formgrader ----------------------------------------------------------------------------------------


@pytest.fixture
def server(course: Path, environment: dict[str, str]) -> Iterator[Callable[[str], bytes]]:
    """Start a Jupyter server in the course; yield a function that fetches one of its pages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def fetch(path: str) -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}")
        request.add_header("Authorization", "token open")
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
            return bytes(answer.read())

    command = [str(SCRIPTS / "jupyter"), "server", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0"]
    command += ["--no-browser", "--allow-root", "--IdentityProvider.token=open"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=course, env=environment, **quiet) as process:
        try:
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, "the server ended"
                try:
                    fetch("api")
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    assert time.monotonic() < deadline, "the server does not answer"
                    time.sleep(0.1)
            yield fetch
        finally:
            process.kill()


def test_formgrader_opens(server: Callable[[str], bytes]) -> None:
    page = BeautifulSoup(server("formgrader"), "html.parser")
    assert "Manage Assignments" in page.get_text(" ")
    listed = {row["name"]: row["max_score"] for row in json.loads(server("formgrader/api/assignments"))}
    assert listed == {slug: POINTS[slug] + ESSAY_POINTS[slug] for slug in CHAPTERS}
