-- The providers that are known from the start, and what providers' words mean.
--
-- Jobs are for those whose key a worker has. Facts are from the providers' own descriptions of
-- their interfaces; docs/providers.md explains each part by an example.

-- Drawn by the worker itself.
insert into private.providers (name, lost_create) values ('preview', 'key') on conflict do nothing;

insert into private.providers (
  name, base_url, secret, key_hosts, hosts, max_running, result_ttl, lost_create, recipe
) values
('replicate', 'https://api.replicate.com/v1', 'REPLICATE_API_TOKEN', '{}',
  '{replicate.delivery,*.replicate.delivery}', null, '1 hour', 'find', '{
  "headers": {"Authorization": "Bearer {{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/predictions",
    "headers": {"Cancel-After": "{{deadline}}s"},
    "body": {"version": "{{ref}}", "input": "{{input}}"},
    "id": "$.id", "echo": "$.input"
  },
  "poll": {
    "url": "{{base}}/predictions/{{id}}",
    "id": "$.id", "state": "$.status",
    "states": {
      "starting": "running", "processing": "running", "succeeded": "done",
      "failed": "failed", "aborted": "failed", "canceled": "stopped"
    },
    "gone_if": "$ ? (@.status == \"succeeded\" && (@.data_removed == true || @.output == null))",
    "outputs": "strict $.output.** ? (@.type() == \"string\" && @ like_regex \"://|^blob:\")",
    "logs": "$.logs", "words": "$.error", "seconds": "$.metrics.predict_time",
    "images": "$.metrics.keyvalue() ? (@.key like_regex \"^image_(output_)?count$\").value"
  },
  "cancel": {"method": "POST", "url": "{{base}}/predictions/{{id}}/cancel", "as": "poll",
    "seconds_at_most": 5},
  "find": {
    "url": "{{base}}/predictions?created_after={{since}}", "next": "$.next",
    "items": [
      "$.results[*] ? ($version != \"\" && @.version == $version)",
      "$.results[*] ? ($version == \"\" && @.model == $model && !(@.version like_regex \"^[0-9a-f]{64}$\"))"
    ],
    "item_id": "$.id", "item_input": "$.input", "shows_all": true
  },
  "upload": {
    "method": "POST", "url": "{{base}}/files", "field": "content", "address": ["urls", "get"]
  },
  "account": {"url": "{{base}}/account"},
  "error_words": "$.detail", "retry_after": "$.retry_after"
}'),
('fal', 'https://queue.fal.run', 'FAL_KEY', '{queue.falrun.com,api.fal.ai}',
  '{fal.media,*.fal.media}', 2, null, 'find', '{
  "headers": {"Authorization": "Key {{secret}}"},
  "places": {"api": "https://api.fal.ai/v1"},
  "create": {
    "method": "POST", "url": "{{base}}/{{ref}}", "body": "{{input}}",
    "id": "$.request_id",
    "handles": {"status": "$.status_url", "result": "$.response_url", "cancel": "$.cancel_url"}
  },
  "poll": {
    "url": "{{handles.status}}?logs=1", "id": "$.request_id", "state": "$.status",
    "states": {"IN_QUEUE": "running", "IN_PROGRESS": "running", "COMPLETED": "done"},
    "logs": "$.logs[last].message", "seconds": "$.metrics.inference_time"
  },
  "result": {"url": "{{handles.result}}", "outputs": ["$.images[*].url", "$.image.url"]},
  "cancel": {
    "method": "PUT", "url": "{{handles.cancel}}", "state": "$.status", "states": {"OK": "failed"}
  },
  "find": {
    "url": "{{api}}/models/requests/by-endpoint?endpoint_id={{ref}}&start={{since}}&expand=payloads&limit=100",
    "items": "$.items[*]", "item_id": "$.request_id", "item_input": "$.json_input",
    "handles": {
      "status": "{{base}}/{{app}}/requests/{{id}}/status",
      "result": "{{base}}/{{app}}/requests/{{id}}",
      "cancel": "{{base}}/{{app}}/requests/{{id}}/cancel"
    }
  },
  "account": {"url": "{{api}}/account/billing?expand=credits"},
  "error_words": ["$.detail ? (@.type() == \"string\")", "$.detail[*].msg", "$.error_type"],
  "errors": [
    {"path": "$.detail[*].type ? (@ == \"content_policy_violation\")", "code": "moderated"},
    {
      "path": "$.detail[*].type ? (@ like_regex \"^(internal_server_error|generation_timeout|downstream_service_.*|no_media_generated)$\")",
      "code": "provider_error"
    },
    {"path": "$.error_type", "code": "provider_error", "step": "result"},
    {"path": "$.detail ? (@.type() == \"string\" && $status >= 500)", "step": "result"}
  ]
}'),
('bfl', 'https://api.bfl.ai/v1', 'BFL_API_KEY', '{*.bfl.ai}',
  '{bfldeliveryprod.blob.core.windows.net}', 24, '10 minutes', 'unknown', '{
  "headers": {"x-key": "{{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/{{ref}}", "body": "{{input}}",
    "id": "$.id", "handles": {"status": "$.polling_url", "cost_usd": "$.cost / 100"}
  },
  "poll": {
    "url": "{{handles.status}}", "id": "$.id", "state": "$.status",
    "states": {
      "Pending": "running", "Ready": "done", "Error": "failed", "Task not found": "gone",
      "Request Moderated": "moderated", "Content Moderated": "moderated"
    },
    "outputs": "$.result.sample", "percent": "$.progress * 100", "seconds": "$.result.duration",
    "words": "$.details"
  },
  "account": {"url": "{{base}}/credits"},
  "error_words": ["$.detail ? (@.type() == \"string\")", "$.detail[*].msg"]
}'),
('openai', 'https://api.openai.com/v1', 'OPENAI_API_KEY', '{}', '{}', null, null, 'unknown', '{
  "headers": {"Authorization": "Bearer {{secret}}"},
  "create": {
    "method": "POST", "url": "{{base}}/images/generations", "body": "{{input}}",
    "seconds_at_most": 240, "outputs": ["$.data[*].b64_json", "$.data[*].url"]
  },
  "account": {"url": "{{base}}/models"},
  "error_words": "$.error.message",
  "errors": [{"path": "$.error.code ? (@ == \"moderation_blocked\")", "code": "moderated"}]
}'),
('comfyui', 'http://127.0.0.1:8188', null, '{}', '{}', 1, null, 'key', '{
  "create": {
    "method": "POST", "url": "{{base}}/prompt",
    "body": {"prompt": "{{input}}", "prompt_id": "{{key}}"}, "id": "$.prompt_id"
  },
  "poll": {
    "url": "{{base}}/history/{{id}}", "state": "$.*.status.status_str",
    "states": {"success": "done", "error": "failed"}, "missing_if": "$ ? (!exists(@.*))",
    "outputs": "$.*.outputs.*.images[*] ? (@.type == \"output\")",
    "output_url": "{{base}}/view?filename={{filename}}&subfolder={{subfolder}}&type=output",
    "words": "$.*.status.messages[*].exception_message"
  },
  "cancel": [
    {"method": "POST", "url": "{{base}}/queue", "body": {"delete": ["{{id}}"]}},
    {"method": "POST", "url": "{{base}}/interrupt", "body": {"prompt_id": "{{id}}"}}
  ],
  "find": {
    "url": "{{base}}/queue", "shows_all": true,
    "alive": ["$.queue_running[*][1]", "$.queue_pending[*][1]"]
  },
  "upload": {
    "method": "POST", "url": "{{base}}/upload/image", "field": "image", "address": ["name"],
    "always": true
  },
  "error_words": ["$.error.message", "$.node_errors.*.errors[*].details"]
}')
on conflict do nothing;

-- Faults of the machine first, for their words may name a safety checker.
insert into private.provider_words (place, pattern, code) values
(10, '\y(out of memory|OOM|CUDA error|segfault|core dumped|traceback)\y', 'provider_error'),
(11, '\yfail(ed|ure) to (load|download|start|initiali[sz]e)\y', 'provider_error'),
(12, '\y(Runtime|Key|Attribute|Import|Module\w*|Assertion)Error\y', 'provider_error'),
(30, '\ynsfw\y', 'moderated'),
(31, '\y(flagged|detected|considered|marked|classified) as (\w+ ){0,3}'
  '(sensitive|unsafe|inappropriate|explicit|harmful)\y', 'moderated'),
(32, '\y(sensitive|explicit|adult|inappropriate|harmful|unsafe|prohibited|disallowed|sexual'
  '|violent)[ _]content\y', 'moderated'),
(33, '\y(violat\w*|against|breach\w*)\y.{0,60}\y(polic(y|ies)|guidelines?|terms|responsible ai)\y',
  'moderated'),
(34, '\y(content|safety|usage)[ _-]?(policy|policies|filter\w*|system|checker)\y', 'moderated'),
(35, '\y(moderat(ed|ion)\w*|responsible ai practices|E005)\y', 'moderated'),
(50, '\y(high demand|at capacity|over(loaded|loading)|too many requests|rate.?limit\w*|E003)\y',
  'provider_busy'),
(51, '\y((temporarily|currently) unavailable|queue is full|interrupted; please retry)\y',
  'provider_busy'),
(70, '\y(cannot identify image file|image file is truncated|(unsupported|invalid|corrupt\w*) image)'
  '\y', 'invalid_input'),
(71, '\ycould not (decode|read|open) (the )?image\y', 'invalid_input'),
(72, '\y(prompt|image|input|text|mask|file)s?\y.{0,40}'
  '\y(too (long|short|large|small|big)|exceeds?|must be|required|maximum|minimum)\y',
  'invalid_input'),
(73, '\y(must be (at (least|most)|between|one of|a multiple|divisible)|not a valid)\y',
  'invalid_input'),
(74, '\y(validation error|unprocessable)\y', 'invalid_input')
on conflict do nothing;
