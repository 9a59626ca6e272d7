"""diffusers: a step of a small UNet2DConditionModel with LoRA adapters, DDPM noise, SNR-weighted loss, EMA, sampling."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from peft import LoraConfig

torch.manual_seed(0)
device = torch.device("cuda")
unet = UNet2DConditionModel(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=4,
)
noise_scheduler = DDPMScheduler(num_train_timesteps=50)
unet.requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
unet.to(device)
lora = [p for p in unet.parameters() if p.requires_grad]
ema = EMAModel(lora, decay=0.9)
ema.to(device)
optimizer = torch.optim.AdamW(lora, lr=1e-3)
for step in range(4):
    latents = torch.randn(6, 4, 8, 8).to(device)
    context = torch.randn(6, 5, 16).to(device)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (6,), device=latents.device).long()
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    pred = unet(noisy, timesteps, context, return_dict=False)[0]
    snr = compute_snr(noise_scheduler, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / snr
    loss = F.mse_loss(pred.float(), noise.float(), reduction="none")
    loss = (loss.mean(dim=list(range(1, len(loss.shape)))) * weights).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lora, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.step(lora)
    print(f"step {step} loss {loss.detach().item():.6f}")
unet.eval()
sample = torch.randn(1, 4, 8, 8).to(device)
noise_scheduler.set_timesteps(3)
with torch.no_grad():
    for t in noise_scheduler.timesteps:
        out = unet(sample, t, torch.zeros(1, 5, 16, device=device)).sample
        sample = noise_scheduler.step(out, t, sample).prev_sample
print(f"sample {sample.abs().mean().item():.6f}")
