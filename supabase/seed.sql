-- The catalogue to start with. Data, not schema: change the rows as you like.
-- Applied by `make up`, and by `supabase db push --include-seed`. Running it again changes nothing.
--
-- The preview provider draws placeholder pictures and needs no key. The Replicate models are listed
-- once they are active:  update public.models set is_active = true where provider = 'replicate';
--
-- A credit is worth about 0.005 US dollars: price_credits covers the provider's price, paid users
-- pay about half. Schemas are what `make import-model` makes of the provider's own, but for the
-- rows with is_schema_confirmed = false: those come from documentation; import them before use.
-- Models billed by the second run on an L40S GPU.
insert into public.models (
  id, provider,
  provider_ref,
  title, price_credits, paid_price_credits, is_active, cost_usd, cost_unit, deadline,
  is_schema_confirmed,
  client_inputs,
  image_inputs, image_count_input, max_images, operator_input,
  input_schema
) values
(
  'darkroom/preview', 'preview',
  'darkroom/preview',
  'Preview (placeholder pictures)', 1, 0, true, 0, 'image', '5 minutes', true,
  '{height,image,num_outputs,seed,width}',
  '{image}', 'num_outputs', 4, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "image": {"type": "string", "format": "uri"},
      "width": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
      "height": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "seed": {"type": "integer", "minimum": 0, "maximum": 2147483647}
    }
  }'
),
(
  'black-forest-labs/flux-schnell', 'replicate',
  'black-forest-labs/flux-schnell',
  'FLUX schnell', 1, 0, false, 0.003, 'image', '2 minutes', true,
  '{aspect_ratio,go_fast,megapixels,num_inference_steps,num_outputs,output_format,output_quality,seed}',
  '{}', 'num_outputs', 4, '{"disable_safety_checker": false}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 4, "default": 4},
      "seed": {"type": "integer"},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 80},
      "disable_safety_checker": {"type": "boolean", "default": false},
      "go_fast": {"type": "boolean", "default": true},
      "megapixels": {"type": "string", "enum": ["1", "0.25"], "default": "1"}
    }
  }'
),
(
  'black-forest-labs/flux-dev', 'replicate',
  'black-forest-labs/flux-dev',
  'FLUX dev', 5, 2, false, 0.025, 'image', '5 minutes', true,
  '{aspect_ratio,go_fast,guidance,image,megapixels,num_inference_steps,num_outputs,output_format,output_quality,prompt_strength,seed}',
  '{image}', 'num_outputs', 4, '{"disable_safety_checker": false}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
      "image": {"type": "string", "format": "uri"},
      "prompt_strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.8},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 28},
      "guidance": {"type": "number", "minimum": 0, "maximum": 10, "default": 3},
      "seed": {"type": "integer"},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 80},
      "disable_safety_checker": {"type": "boolean", "default": false},
      "go_fast": {"type": "boolean", "default": true},
      "megapixels": {"type": "string", "enum": ["1", "0.25"], "default": "1"}
    }
  }'
),
(
  'black-forest-labs/flux-krea-dev', 'replicate',
  'black-forest-labs/flux-krea-dev',
  'FLUX Krea dev', 5, 2, false, null, null, '5 minutes', false,
  '{aspect_ratio,go_fast,guidance,image,megapixels,num_inference_steps,num_outputs,output_format,output_quality,prompt_strength,seed}',
  '{image}', 'num_outputs', 4, '{"disable_safety_checker": false}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
      "image": {"type": "string", "format": "uri"},
      "prompt_strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.8},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 28},
      "guidance": {"type": "number", "minimum": 0, "maximum": 10, "default": 3},
      "seed": {"type": "integer"},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 80},
      "disable_safety_checker": {"type": "boolean", "default": false},
      "go_fast": {"type": "boolean", "default": true},
      "megapixels": {"type": "string", "enum": ["1", "0.25"], "default": "1"}
    }
  }'
),
(
  'black-forest-labs/flux-1.1-pro', 'replicate',
  'black-forest-labs/flux-1.1-pro',
  'FLUX 1.1 pro', 8, 4, false, 0.04, 'image', '5 minutes', true,
  '{aspect_ratio,height,image_prompt,output_format,output_quality,prompt_upsampling,seed,width}',
  '{image_prompt}', null, 1, '{"safety_tolerance": 2}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "image_prompt": {"type": "string", "format": "uri"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "custom", "1:1", "16:9", "3:2", "2:3", "4:5", "5:4", "9:16", "3:4", "4:3"]},
      "width": {"type": "integer", "minimum": 256, "maximum": 1440},
      "height": {"type": "integer", "minimum": 256, "maximum": 1440},
      "safety_tolerance": {"type": "integer", "minimum": 1, "maximum": 6, "default": 2},
      "seed": {"type": "integer"},
      "prompt_upsampling": {"type": "boolean", "default": false},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 80}
    }
  }'
),
(
  'stability-ai/sdxl', 'replicate',
  'stability-ai/sdxl:7762fd07cf82c948538e41f63f77d685e02b063e37e496e96eefd46c929f9bdc',
  'SDXL', 2, 1, false, 0.000975, 'second', '10 minutes', true,
  '{guidance_scale,height,high_noise_frac,image,lora_scale,mask,negative_prompt,num_inference_steps,num_outputs,prompt_strength,refine,refine_steps,scheduler,seed,width}',
  '{image,mask}', 'num_outputs', 4, '{"disable_safety_checker": false}',
  '{
    "required": [],
    "properties": {
      "prompt": {"type": "string", "default": "An astronaut riding a rainbow unicorn"},
      "negative_prompt": {"type": "string", "default": ""},
      "image": {"type": "string", "format": "uri"},
      "mask": {"type": "string", "format": "uri"},
      "width": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
      "height": {"type": "integer", "minimum": 64, "maximum": 2048, "default": 1024},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "scheduler": {"type": "string", "default": "K_EULER", "enum": [
        "DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL",
        "K_EULER", "PNDM"]},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 500, "default": 50},
      "guidance_scale": {"type": "number", "minimum": 1, "maximum": 50, "default": 7.5},
      "prompt_strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.8},
      "seed": {"type": "integer"},
      "refine": {"type": "string", "default": "no_refiner", "enum": [
        "no_refiner", "expert_ensemble_refiner", "base_image_refiner"]},
      "high_noise_frac": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.8},
      "refine_steps": {"type": "integer", "minimum": 0, "maximum": 500},
      "apply_watermark": {"type": "boolean", "default": true},
      "lora_scale": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.6},
      "replicate_weights": {"type": "string"},
      "disable_safety_checker": {"type": "boolean", "default": false}
    }
  }'
),
(
  'stability-ai/stable-diffusion-3.5-large', 'replicate',
  'stability-ai/stable-diffusion-3.5-large',
  'Stable Diffusion 3.5 Large', 13, 6, false, 0.065, 'image', '5 minutes', true,
  '{aspect_ratio,cfg,image,output_format,output_quality,prompt_strength,seed,steps}',
  '{image}', null, 1, '{}',
  '{
    "required": [],
    "properties": {
      "prompt": {"type": "string", "default": ""},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"]},
      "cfg": {"type": "number", "minimum": 0, "maximum": 20, "default": 3.5},
      "image": {"type": "string", "format": "uri"},
      "prompt_strength": {"type": "number", "default": 0.85},
      "steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 35},
      "seed": {"type": "integer"},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 90}
    }
  }'
),
(
  'bytedance/sdxl-lightning-4step', 'replicate',
  'bytedance/sdxl-lightning-4step:5599ed30703defd1d160a25a63321b4dec97101d98b4674bcc56e41f62f35637',
  'SDXL Lightning', 1, 0, false, 0.000975, 'second', '10 minutes', true,
  '{guidance_scale,height,negative_prompt,num_inference_steps,num_outputs,scheduler,seed,width}',
  '{}', 'num_outputs', 4, '{"disable_safety_checker": false}',
  '{
    "required": [],
    "properties": {
      "prompt": {"type": "string", "default": "self-portrait of a woman, lightning in the background"},
      "negative_prompt": {"type": "string", "default": "worst quality, low quality"},
      "width": {"type": "integer", "minimum": 256, "maximum": 1280, "default": 1024},
      "height": {"type": "integer", "minimum": 256, "maximum": 1280, "default": 1024},
      "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4, "default": 1},
      "scheduler": {"type": "string", "default": "K_EULER", "enum": [
        "DDIM", "DPMSolverMultistep", "HeunDiscrete", "KarrasDPM", "K_EULER_ANCESTRAL",
        "K_EULER", "PNDM", "DPM++2MSDE"]},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 10, "default": 4},
      "guidance_scale": {"type": "number", "minimum": 0, "maximum": 50, "default": 0},
      "seed": {"type": "integer"},
      "disable_safety_checker": {"type": "boolean", "default": false}
    }
  }'
),
(
  'bytedance/seedream-3', 'replicate',
  'bytedance/seedream-3',
  'Seedream 3', 6, 3, false, 0.03, 'image', '5 minutes', false,
  '{aspect_ratio,guidance_scale,height,seed,size,width}',
  '{}', null, 1, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "16:9", "enum": [
        "1:1", "3:4", "4:3", "16:9", "9:16", "2:3", "3:2", "21:9", "custom"]},
      "size": {"type": "string", "enum": ["small", "regular", "big"], "default": "regular"},
      "width": {"type": "integer", "minimum": 512, "maximum": 2048, "default": 2048},
      "height": {"type": "integer", "minimum": 512, "maximum": 2048, "default": 2048},
      "guidance_scale": {"type": "number", "minimum": 1, "maximum": 10, "default": 2.5},
      "seed": {"type": "integer"}
    }
  }'
),
(
  'bytedance/seedream-4', 'replicate',
  'bytedance/seedream-4',
  'Seedream 4', 6, 3, false, 0.03, 'image', '10 minutes', false,
  '{aspect_ratio,enhance_prompt,height,image_input,max_images,sequential_image_generation,size,width}',
  '{image_input}', 'max_images', 15, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "image_input": {"type": "array", "items": {"type": "string", "format": "uri"}, "maxItems": 10},
      "size": {"type": "string", "enum": ["1K", "2K", "4K", "custom"], "default": "2K"},
      "aspect_ratio": {"type": "string", "default": "match_input_image", "enum": [
        "match_input_image", "1:1", "4:3", "3:4", "16:9", "9:16", "3:2", "2:3", "21:9"]},
      "width": {"type": "integer", "minimum": 1024, "maximum": 4096, "default": 2048},
      "height": {"type": "integer", "minimum": 1024, "maximum": 4096, "default": 2048},
      "sequential_image_generation": {"type": "string", "default": "disabled", "enum": [
        "disabled", "auto"]},
      "max_images": {"type": "integer", "minimum": 1, "maximum": 15, "default": 1},
      "enhance_prompt": {"type": "boolean", "default": true}
    }
  }'
),
(
  'ideogram-ai/ideogram-v3-turbo', 'replicate',
  'ideogram-ai/ideogram-v3-turbo',
  'Ideogram 3 Turbo', 6, 3, false, 0.03, 'image', '5 minutes', false,
  '{aspect_ratio,image,magic_prompt_option,mask,seed,style_reference_images,style_type}',
  '{image,mask,style_reference_images}', null, 1, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:3", "3:1", "1:2", "2:1", "9:16", "16:9", "10:16", "16:10", "2:3", "3:2", "3:4", "4:3",
        "4:5", "5:4", "1:1"]},
      "image": {"type": "string", "format": "uri"},
      "mask": {"type": "string", "format": "uri"},
      "style_reference_images": {"type": "array", "items": {"type": "string", "format": "uri"}},
      "magic_prompt_option": {"type": "string", "enum": ["Auto", "On", "Off"], "default": "Auto"},
      "style_type": {"type": "string", "default": "None", "enum": [
        "None", "Auto", "General", "Realistic", "Design"]},
      "seed": {"type": "integer", "maximum": 2147483647}
    }
  }'
),
(
  'google/imagen-4-fast', 'replicate',
  'google/imagen-4-fast',
  'Imagen 4 Fast', 4, 2, false, 0.02, 'image', '2 minutes', false,
  '{aspect_ratio,output_format}',
  '{}', null, 1, '{"safety_filter_level": "block_medium_and_above"}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "aspect_ratio": {"type": "string", "default": "1:1", "enum": [
        "1:1", "9:16", "16:9", "3:4", "4:3"]},
      "output_format": {"type": "string", "enum": ["jpg", "png"], "default": "jpg"},
      "safety_filter_level": {"type": "string", "default": "block_only_high", "enum": [
        "block_low_and_above", "block_medium_and_above", "block_only_high"]}
    }
  }'
),
(
  'recraft-ai/recraft-v3', 'replicate',
  'recraft-ai/recraft-v3',
  'Recraft 3', 8, 4, false, 0.04, 'image', '5 minutes', true,
  '{size,style}',
  '{}', null, 1, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "size": {"type": "string", "default": "1024x1024", "enum": [
        "1024x1024", "1365x1024", "1024x1365", "1536x1024", "1024x1536", "1820x1024",
        "1024x1820", "1024x2048", "2048x1024", "1434x1024", "1024x1434", "1024x1280",
        "1280x1024", "1024x1707", "1707x1024"]},
      "style": {"type": "string", "default": "any", "enum": [
        "any", "realistic_image", "digital_illustration", "digital_illustration/pixel_art",
        "digital_illustration/hand_drawn", "digital_illustration/grain",
        "digital_illustration/infantile_sketch", "digital_illustration/2d_art_poster",
        "digital_illustration/handmade_3d", "digital_illustration/hand_drawn_outline",
        "digital_illustration/engraving_color", "digital_illustration/2d_art_poster_2",
        "realistic_image/b_and_w", "realistic_image/hard_flash", "realistic_image/hdr",
        "realistic_image/natural_light", "realistic_image/studio_portrait",
        "realistic_image/enterprise", "realistic_image/motion_blur"]}
    }
  }'
),
(
  'recraft-ai/recraft-v3-svg', 'replicate',
  'recraft-ai/recraft-v3-svg',
  'Recraft 3 SVG', 16, 8, false, 0.08, 'image', '5 minutes', true,
  '{size,style}',
  '{}', null, 1, '{}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "size": {"type": "string", "default": "1024x1024", "enum": [
        "1024x1024", "1365x1024", "1024x1365", "1536x1024", "1024x1536", "1820x1024",
        "1024x1820", "1024x2048", "2048x1024", "1434x1024", "1024x1434", "1024x1280",
        "1280x1024", "1024x1707", "1707x1024"]},
      "style": {"type": "string", "default": "any", "enum": [
        "any", "engraving", "line_art", "line_circuit", "linocut"]}
    }
  }'
),
(
  'qwen/qwen-image', 'replicate',
  'qwen/qwen-image',
  'Qwen Image', 5, 2, false, null, null, '5 minutes', false,
  '{aspect_ratio,enhance_prompt,go_fast,guidance,image,lora_scale,negative_prompt,num_inference_steps,output_format,output_quality,seed,strength}',
  '{image}', null, 1, '{"disable_safety_checker": false}',
  '{
    "required": ["prompt"],
    "properties": {
      "prompt": {"type": "string"},
      "negative_prompt": {"type": "string", "default": " "},
      "aspect_ratio": {"type": "string", "default": "16:9", "enum": [
        "1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"]},
      "image_size": {"type": "string", "default": "optimize_for_quality", "enum": [
        "optimize_for_quality", "optimize_for_speed"]},
      "image": {"type": "string", "format": "uri"},
      "strength": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.9},
      "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 50, "default": 30},
      "guidance": {"type": "number", "minimum": 0, "maximum": 10, "default": 3},
      "go_fast": {"type": "boolean", "default": true},
      "enhance_prompt": {"type": "boolean", "default": false},
      "seed": {"type": "integer"},
      "output_format": {"type": "string", "enum": ["webp", "jpg", "png"], "default": "webp"},
      "output_quality": {"type": "integer", "minimum": 0, "maximum": 100, "default": 80},
      "disable_safety_checker": {"type": "boolean", "default": false},
      "lora_weights": {"type": "string"},
      "lora_scale": {"type": "number", "default": 1}
    }
  }'
)
on conflict (id) do nothing;
