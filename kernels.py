import torch.nn.functional as F
def attention(q, k, v, kv_len=None, mask=None, scale=None):
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=None if mask is None else mask[:, None, None])
    return o.transpose(1, 2)
