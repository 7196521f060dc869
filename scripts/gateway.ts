/**
 * The local stack's one address, with the paths of a Supabase project:
 *
 *     /rest/v1       PostgREST, the engine the API is made for (Supabase Lite where there is none)
 *     /auth/v1       Supabase Lite
 *     /storage/v1    Supabase Lite, with what it lacks: uploads of `File` and `Blob`, signed addresses
 *     /functions/v1  supabase/functions, see functions.ts
 *
 * What it does otherwise than a Supabase project; docs/quickstart.md says the same:
 *
 * - It asks for no `apikey`, and knows only legacy keys, which are JWTs. A project answers 401
 *   without a key.
 * - It has no Realtime: an app polls.
 * - It sends no mail: an address is confirmed at once, and a forgotten password cannot be reset.
 *   Nobody signs in through a third party.
 * - It calls edge functions without checking the token, as this project's want it (`verify_jwt =
 *   false`). They share one process and log to `logs/functions.log`.
 * - Of files, `list` names everything below a folder by its whole path, `createSignedUrls` fails as
 *   a whole, and the type of a download follows its name. Nothing transforms images, resumes
 *   uploads (TUS) or speaks S3.
 * - It grants a table of yours to nobody: grant it to `authenticated` and `service_role` yourself.
 * - It takes 1 MB a request and 50 MiB a file, and does not limit how many.
 * - It is plain HTTP on 127.0.0.1, unless `make app DEV=1` opens it to a network.
 */
import { Buffer } from 'node:buffer';

const MAX_BODY = 1_000_000;
const MAX_FILE = 50 * 1024 * 1024;
const MULTIPART = 64 * 1024; // what `FormData` may add to a file
const NAMELESS = 'name=""';

const env = (name: string) => Deno.env.get(name) ?? '';
const routes: Record<string, { url: string; most: number }> = {
  rest: { url: env('REST_URL'), most: MAX_BODY },
  auth: { url: `${env('LITE_URL')}/auth/v1`, most: MAX_BODY },
  storage: { url: `${env('LITE_URL')}/storage/v1`, most: MAX_FILE + MULTIPART },
  functions: { url: env('FUNCTIONS_URL'), most: MAX_BODY },
};
/** Before cells: tables and functions that the entry has not are home's. */
const home = { url: env('HOME_URL'), most: MAX_BODY };
const entryHas = new RegExp(`^/(rpc/)?(${env('ENTRY_HAS')})$`);
/** What belongs to one connection, or says who is asked: never passed on. */
const HOPS = /^(connection|keep-alive|proxy-.*|te|trailer|transfer-encoding|upgrade|host|expect)$/;
const ANY_ORIGIN = { 'access-control-allow-origin': '*' };

const refuse = (status: number, message: string) =>
  Response.json({ code: 'GATEWAY', message, details: null, hint: null }, {
    status,
    headers: ANY_ORIGIN,
  });

/** Lite closes a connection after 5 idle seconds; ours goes first, so none is found closed. */
const client = Deno.createHttpClient({ poolIdleTimeout: 2_000 });

type Bytes = Buffer<ArrayBuffer>;

class Refusal extends Error {
  constructor(readonly status: number, message: string) {
    super(message);
  }
}

/** Reads a body whole, up to so many bytes, whatever its length was said to be. */
async function bodyOf({ headers, body }: Request, most: number): Promise<Bytes | null> {
  const refusal = new Refusal(413, `The body is larger than ${most} bytes.`);
  if (Number(headers.get('content-length')) > most) throw refusal;
  if (!body) return null;
  const parts: Uint8Array[] = [];
  let size = 0;
  for await (const part of body) {
    size += part.length;
    if (size > most) throw refusal;
    parts.push(part);
  }
  return Buffer.concat(parts);
}

function passed(from: Headers): Headers {
  const named = (from.get('connection') ?? '').toLowerCase().split(/[\s,]+/);
  const kept = [...from].filter(([name]) => !HOPS.test(name) && !named.includes(name));
  return new Headers(kept);
}

/** Takes the file out of a form, which is how supabase-js sends `File` and `Blob`. */
async function unwrap(headers: Headers, bytes: Bytes): Promise<Bytes> {
  const at = bytes.indexOf(NAMELESS); // supabase-js gives the file no name: Deno passes over such
  if (at >= 0) {
    const [before, after] = [bytes.subarray(0, at), bytes.subarray(at + NAMELESS.length)];
    bytes = Buffer.concat([before, Buffer.from('name="file"'), after]);
  }
  const form = await new Response(bytes, { headers }).formData().catch(() => new FormData());
  const file = [...form.values()].find((value) => value instanceof File);
  if (!file) throw new Refusal(400, 'There is no file in the form.');
  const seconds = form.get('cacheControl');
  if (seconds) headers.set('cache-control', `max-age=${seconds}`);
  headers.set('content-type', file.type || 'application/octet-stream');
  return Buffer.from(await file.arrayBuffer());
}

/** Says where a signed address is as Supabase does: below /storage/v1, in `signedURL` or `url`. */
function signed(answer: Record<string, unknown>): unknown {
  if (typeof answer.signedUrl !== 'string') return answer;
  const url = answer.signedUrl.replace('/storage/v1', '') || null;
  return { ...answer, signedURL: url, url };
}

async function answer(request: Request): Promise<Response> {
  const { pathname, search } = new URL(request.url);
  const [, part = '', rest = ''] = /^\/(rest|auth|storage|functions)\/v1(\/.*)?$/.exec(pathname) ??
    [];
  const route = part === 'rest' && home.url && !entryHas.test(rest) ? home : routes[part];
  if (!route) throw new Refusal(404, 'There is no such path.');
  if (request.method === 'OPTIONS' && part !== 'functions') {
    return new Response(null, {
      status: 204,
      headers: {
        ...ANY_ORIGIN,
        'access-control-allow-methods': 'GET, HEAD, POST, PUT, PATCH, DELETE',
        'access-control-allow-headers': request.headers.get('access-control-request-headers') ??
          '*',
        'access-control-max-age': '86400',
      },
    });
  }
  const headers = passed(request.headers);
  headers.set('accept-encoding', 'identity');
  const key = headers.get('apikey');
  if (key && part !== 'functions' && !headers.has('authorization')) {
    headers.set('authorization', `Bearer ${key}`);
  }
  let body = await bodyOf(request, route.most);
  if (body && part === 'storage' && headers.get('content-type')?.startsWith('multipart/')) {
    body = await unwrap(headers, body);
  }
  headers.delete('content-length'); // fetch knows it
  const { method, signal } = request;
  const reply = await fetch(route.url + rest + search, {
    ...{ method, headers, body, signal, client, redirect: 'manual' },
  });
  const back = passed(reply.headers);
  if (part !== 'functions') back.set('access-control-allow-origin', '*');
  if (method === 'POST' && /^\/object\/(upload\/)?sign\//.test(rest) && reply.ok) {
    const told = await reply.json();
    back.delete('content-length');
    back.delete('transfer-encoding');
    return Response.json(Array.isArray(told) ? told.map(signed) : signed(told), { headers: back });
  }
  return new Response(reply.body, { status: reply.status, headers: back });
}

Deno.serve({
  hostname: env('API_HOST'),
  port: Number(env('API_PORT')),
  onListen() {},
}, async (request) => {
  try {
    return await answer(request);
  } catch (error) {
    if (error instanceof Refusal) return refuse(error.status, error.message);
    if (!request.signal.aborted) console.error(error);
    return refuse(
      502,
      'A part of the stack does not answer: make status tells which, and its log.',
    );
  }
});
