"""nn.Transformer for translation, as in the tutorial: masks, label smoothing, Noam schedule, greedy decoding."""

import math

import torch
import torch.nn as nn

torch.manual_seed(0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAD, BOS, EOS = 1, 2, 3


class PositionalEncoding(nn.Module):
    def __init__(self, emb_size, maxlen=64):
        super().__init__()
        den = torch.exp(-torch.arange(0, emb_size, 2) * math.log(10000) / emb_size)
        pos = torch.arange(0, maxlen).reshape(maxlen, 1)
        table = torch.zeros((maxlen, emb_size))
        table[:, 0::2] = torch.sin(pos * den)
        table[:, 1::2] = torch.cos(pos * den)
        self.register_buffer("pos_embedding", table.unsqueeze(-2))

    def forward(self, x):
        return x + self.pos_embedding[: x.size(0), :]


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, 0.0)
        self.generator = nn.Linear(32, 40)
        self.src_tok_emb, self.tgt_tok_emb = nn.Embedding(40, 32), nn.Embedding(40, 32)
        self.positional_encoding = PositionalEncoding(32)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, src, trg, src_mask, tgt_mask, src_padding_mask, tgt_padding_mask, memory_mask):
        src_emb = self.positional_encoding(self.src_tok_emb(src) * math.sqrt(32))
        tgt_emb = self.positional_encoding(self.tgt_tok_emb(trg) * math.sqrt(32))
        outs = self.transformer(
            src_emb, tgt_emb, src_mask, tgt_mask, None, src_padding_mask, tgt_padding_mask, memory_mask
        )
        return self.generator(outs)

    def encode(self, src, src_mask):
        return self.transformer.encoder(self.positional_encoding(self.src_tok_emb(src) * math.sqrt(32)), src_mask)

    def decode(self, tgt, memory, tgt_mask):
        return self.transformer.decoder(
            self.positional_encoding(self.tgt_tok_emb(tgt) * math.sqrt(32)), memory, tgt_mask
        )


def generate_square_subsequent_mask(sz):
    mask = (torch.triu(torch.ones((sz, sz), device=DEVICE)) == 1).transpose(0, 1)
    return mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)


def create_mask(src, tgt):
    tgt_mask = generate_square_subsequent_mask(tgt.shape[0])
    src_mask = torch.zeros((src.shape[0], src.shape[0]), device=DEVICE).type(torch.bool)
    return src_mask, tgt_mask, (src == PAD).transpose(0, 1), (tgt == PAD).transpose(0, 1)


model = Seq2Seq().to(DEVICE)
loss_fn = nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=0.1)
optimizer = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
noam = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 32**-0.5 * min((s + 1) ** -0.5, (s + 1) * 20**-1.5))
for step in range(5):
    src = torch.randint(4, 40, (9, 10))
    src[7:, ::3] = PAD
    tgt = torch.cat([torch.full((1, 10), BOS), src.flip(0)[:8]])
    src, tgt = src.to(DEVICE), tgt.to(DEVICE)
    tgt_input = tgt[:-1, :]
    masks = create_mask(src, tgt_input)
    logits = model(src, tgt_input, *masks, masks[2])
    optimizer.zero_grad()
    loss = loss_fn(logits.reshape(-1, logits.shape[-1]), tgt[1:, :].reshape(-1))
    loss.backward()
    optimizer.step()
    noam.step()
    print(f"step {step} loss {loss.item():.6f}")
model.eval()
src = torch.randint(4, 40, (5, 1)).to(DEVICE)
memory = model.encode(src, torch.zeros(5, 5, device=DEVICE).type(torch.bool))
ys = torch.ones(1, 1).fill_(BOS).type(torch.long).to(DEVICE)
for _ in range(4):
    out = model.decode(ys, memory, generate_square_subsequent_mask(ys.size(0)).type(torch.bool)).transpose(0, 1)
    _, next_word = torch.max(model.generator(out[:, -1]), dim=1)
    next_word = next_word.item()
    ys = torch.cat([ys, torch.ones(1, 1).type_as(src.data).fill_(next_word)], dim=0)
    if next_word == EOS:
        break
print("decoded", ys.flatten().tolist())
