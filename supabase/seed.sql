-- The catalogue to start with. Data, not schema: change the rows as you like.
-- Applied by `make up`, and by `supabase db push --include-seed`. Running it again changes nothing.
--
-- The preview provider draws placeholder pictures and needs no key. The Replicate models are listed
-- once they are active:  update public.models set is_active = true where provider = 'replicate';
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, is_active,
  client_inputs, image_count_input, max_images, input_schema
) values
(
  'darkroom/preview', 'preview', 'darkroom/preview', 'Preview (placeholder pictures)', 1, 0, true,
  '{width,height,seed,num_outputs}', 'num_outputs', 4,
  '{"properties": {
    "prompt": {"type": "string"},
    "width": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
    "height": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
    "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2147483647}
  }}'
),
(
  'black-forest-labs/flux-schnell', 'replicate', 'black-forest-labs/flux-schnell', 'FLUX schnell', 1, 0, false,
  '{aspect_ratio,num_outputs,output_format,seed}', 'num_outputs', 4,
  '{"properties": {
    "prompt": {"type": "string"},
    "aspect_ratio": {"type": "string", "default": "1:1", "enum":
      ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
    "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
    "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
    "seed": {"type": "integer"}
  }}'
),
(
  'black-forest-labs/flux-dev', 'replicate', 'black-forest-labs/flux-dev', 'FLUX dev', 5, 2, false,
  '{aspect_ratio,guidance,num_inference_steps,num_outputs,output_format,seed}', 'num_outputs', 4,
  '{"properties": {
    "prompt": {"type": "string"},
    "aspect_ratio": {"type": "string", "default": "1:1", "enum":
      ["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
    "guidance": {"type": "number", "minimum": 0, "maximum": 10, "default": 3},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 28},
    "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
    "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
    "seed": {"type": "integer"}
  }}'
),
(
  'black-forest-labs/flux-1.1-pro', 'replicate', 'black-forest-labs/flux-1.1-pro', 'FLUX 1.1 pro', 8, 4, false,
  '{aspect_ratio,output_format,seed}', null, 1,
  '{"properties": {
    "prompt": {"type": "string"},
    "aspect_ratio": {"type": "string", "default": "1:1", "enum":
      ["1:1", "16:9", "3:2", "2:3", "4:5", "5:4", "9:16", "3:4", "4:3"]},
    "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
    "seed": {"type": "integer"}
  }}'
)
on conflict (id) do nothing;
