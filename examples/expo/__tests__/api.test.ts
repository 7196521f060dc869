/** The API over a real supabase-js client; only the network is not real. */
import { createClient } from '@supabase/supabase-js';

import { type Api, createApi, DarkroomError, type Database } from '../src/darkroom';

interface Request {
  method: string;
  path: string;
  query: Record<string, string>;
  token: string | null;
  headers: Headers;
  body: unknown;
}
type Answer = (request: Request, init: RequestInit) => Response | Promise<Response>;

const json = (status: number, body: unknown) =>
  new Response(JSON.stringify(body), { status, headers: { 'content-type': 'application/json' } });
const text = (status: number, body: string) => new Response(body, { status });

const ASKED = {
  model: 'darkroom/preview',
  prompt: 'a cat',
  params: { width: 768 },
  idempotency_key: 'key',
  max_price_credits: 2,
};

/** Valid for an hour; nobody looks at the signature. */
function newSession(name: string) {
  const expires_at = Math.floor(Date.now() / 1000) + 3600;
  const part = (value: object) => btoa(JSON.stringify(value)).replace(/=/g, '');
  const payload = part({ sub: 'ada', name, exp: expires_at });
  const access_token = `${part({ alg: 'HS256' })}.${payload}.${'x'.repeat(43)}`;
  const user = { id: 'ada' };
  const token_type = 'bearer';
  const refresh_token = `refresh ${name}`;
  return { access_token, refresh_token, token_type, expires_in: 3600, expires_at, user };
}
const OLD = newSession('old');
const NEW = newSession('new');

class Gateway {
  readonly requests: Request[] = [];
  /** One for each request; the last one stays. */
  answers: Answer[] = [() => json(200, [])];
  /** What the session server answers to a refresh. */
  refresh: Answer = () => json(200, NEW);

  fetch = async (input: RequestInfo | URL, init: RequestInit = {}): Promise<Response> => {
    const url = new URL(String(input));
    const headers = new Headers(init.headers);
    const request = {
      method: init.method ?? 'GET',
      path: url.pathname,
      query: Object.fromEntries(url.searchParams),
      token: headers.get('authorization')?.replace('Bearer ', '') ?? null,
      headers,
      body: typeof init.body === 'string' ? (JSON.parse(init.body) as unknown) : init.body,
    };
    this.requests.push(request);
    if (request.path === '/auth/v1/token') return this.refresh(request, init);
    const answer = this.answers.length > 1 ? this.answers.shift()! : this.answers[0]!;
    return answer(request, init);
  };

  paths = () => this.requests.map(({ path }) => path);
  last = () => this.requests.at(-1)!;
}

let gateway: Gateway;
let api: Api;

function connect(session: object | null = OLD): Api {
  let stored = session && JSON.stringify(session);
  const storage = {
    getItem: () => stored,
    setItem: (_: string, text: string) => void (stored = text),
    removeItem: () => void (stored = null),
  };
  const auth = { storage, storageKey: 'session', autoRefreshToken: false };
  const options = { auth, global: { fetch: gateway.fetch } };
  return createApi(createClient<Database>('http://127.0.0.1:1', 'anon-key', options));
}

const failure = (promise: Promise<unknown>) =>
  promise.then(
    () => Promise.reject(new Error('it did not fail')),
    (error: DarkroomError) => error,
  );
const JOB = '01a20068-0000-7000-8000-000000000001';
const TAGS = { job_id: JOB, tags: ['a'] };

beforeEach(() => {
  gateway = new Gateway();
  api = connect();
});

describe('a read', () => {
  test.each<[string, () => Promise<unknown>, string, Record<string, string>]>([
    ['ping', () => api.ping(), 'ping', {}],
    ['models', () => api.models(), 'list_models', {}],
    ['entitlement', () => api.entitlement(), 'get_entitlement', {}],
    ['the first page', () => api.page(null), 'list_generations', { page_size: '20' }],
    ['a page', () => api.page(JOB), 'list_generations', { page_size: '20', before: JOB }],
    ['no jobs', () => api.activeJobs([]), 'list_active_jobs', { job_ids: '{}' }],
    ['jobs', () => api.activeJobs([JOB, 'b']), 'list_active_jobs', { job_ids: `{${JOB},b}` }],
  ])('of %s is a GET with its arguments in the address', async (_, read, name, query) => {
    await read();

    expect(gateway.last()).toMatchObject({ method: 'GET', path: `/rest/v1/rpc/${name}`, query });
    expect(gateway.last().query).toEqual(query);
  });

  test('answers what the function answered', async () => {
    gateway.answers = [() => json(200, { generations: [], next_before: JOB })];

    expect(await api.page(null)).toEqual({ generations: [], next_before: JOB });
  });

  test('is not repeated by the client: the store decides that', async () => {
    gateway.answers = [() => json(503, { message: 'no' })];

    await failure(api.models());

    expect(gateway.requests).toHaveLength(1);
  });

  test('is sent with the token of the session', async () => {
    await api.models();

    expect(gateway.last().token).toBe(OLD.access_token);
  });
});

describe('a request', () => {
  test.each<[string, () => Promise<unknown>, string, object]>([
    [
      'enqueue',
      () => api.enqueue(ASKED),
      'enqueue_generation',
      ASKED,
    ],
    ['retry', () => api.retry(JOB, 2), 'retry_generation', { job_id: JOB, max_price_credits: 2 }],
    ['cancel', () => api.cancel(JOB), 'cancel_generation', { job_id: JOB }],
    ['any other', () => api.call('set_tags', TAGS), 'set_tags', TAGS],
  ])('to %s is a POST with its arguments in the body', async (_, ask, name, body) => {
    await ask();

    expect(gateway.last()).toMatchObject({ method: 'POST', path: `/rest/v1/rpc/${name}`, body });
  });
});

describe('a refusal', () => {
  test('has the token, the status, and details and hint in one', async () => {
    const body = {
      code: 'PT402',
      message: 'insufficient_credits',
      details: 'need 2, have 1',
      hint: 'Buy credits.',
    };
    gateway.answers = [() => json(402, body)];

    const error = await failure(api.enqueue(ASKED));

    expect(error).toBeInstanceOf(DarkroomError);
    expect(error).toMatchObject({
      token: 'insufficient_credits',
      status: 402,
      detail: 'need 2, have 1. Buy credits.',
      isUnanswered: false,
    });
  });

  test.each([
    ['no hint', { details: 'It is late.', hint: null }, 'It is late.'],
    ['no details', { details: null, hint: 'Come tomorrow.' }, 'Come tomorrow.'],
    ['neither', {}, ''],
  ])('may have %s', async (_, more, detail) => {
    gateway.answers = [() => json(400, { code: 'PT400', message: 'invalid_input', ...more })];

    expect(await failure(api.retry(JOB, 1))).toMatchObject({ token: 'invalid_input', detail });
  });

  test.each([
    ['the database, busy', 503, { code: 'PT503', message: 'busy' }, 'busy'],
    ['the database, too many', 429, { code: 'PT429', message: 'rate_limited' }, 'rate_limited'],
    ['the gateway', 404, { code: 'PGRST202', message: 'no function' }, 'no function'],
  ])('comes from %s (%i)', async (_, status, body, token) => {
    gateway.answers = [() => json(status, body)];

    const error = await failure(api.enqueue(ASKED));

    expect(error).toMatchObject({ token, status, isUnanswered: false });
  });
});

describe('a refusal for now', () => {
  const standby = 'cannot set transaction read-write mode during recovery';

  test.each([
    ['too_many_active', 429, 'PT429', 'too_many_active', 'Try again in 5 seconds.', false, 5_000],
    ['busy', 503, 'PT503', 'busy', 'Try again in 60 seconds.', false, 60_000],
    ['unavailable', 503, 'PT503', 'unavailable', 'Try again in 30 seconds.', true, 30_000],
    ['unavailable', 400, '0A000', standby, null, true, 0],
    ['unavailable', 405, '25006', 'cannot execute UPDATE', null, true, 0],
    ['budget_spent', 503, 'PT503', 'budget_spent', 'Try again in 900 seconds.', false, 900_000],
    ['idempotency_conflict', 409, 'PT409', 'idempotency_conflict', 'Use a new key.', false, 0],
  ])('%s (%i, %s)', async (token, status, code, message, hint, isUnanswered, retryAfterMs) => {
    gateway.answers = [() => json(status, { code, message, details: 'No.', hint })];

    const error = await failure(api.enqueue(ASKED));

    expect(error).toMatchObject({ token, status, isUnanswered, retryAfterMs });
  });
});

describe('no answer', () => {
  const html = '<html><h1>Sign in to this network</h1></html>';

  test.each<[string, Answer]>([
    ['a broken connection', () => Promise.reject(new TypeError('Network request failed'))],
    ['an error of a proxy in HTML', () => text(502, html)],
    ['a page of a hotel in place of the answer', () => text(200, html)],
    ['an empty page', () => text(200, '')],
    ['an empty page that says there is none', () => text(404, '')],
    ['an error of the database', () => json(500, { code: '57014', message: 'timeout' })],
    ['a database that hung up', () => json(400, { code: '', message: '' })],
    ['a gateway without a database', () => json(503, { code: 'PGRST001', message: 'no' })],
    ['a gateway without a connection', () => json(504, { code: 'PGRST003', message: 'no' })],
    ['an error of 5xx without a code', () => json(503, { message: 'no healthy upstream' })],
    ['too much for a proxy', () => text(429, html)],
    ['too slow for a proxy', () => text(408, html)],
  ])('is %s: nobody knows whether it was done', async (_, answer) => {
    gateway.answers = [answer];

    const error = await failure(api.enqueue(ASKED));

    expect(error).toBeInstanceOf(DarkroomError);
    expect(error).toMatchObject({ token: 'unreachable', isUnanswered: true });
    expect(gateway.requests).toHaveLength(1);
  });

  test('is none within 15 seconds; the request is given up', async () => {
    jest.useFakeTimers();
    let signal: AbortSignal | null | undefined;
    gateway.answers = [(_, init) => ((signal = init.signal), new Promise(() => {}))];
    const error = failure(api.models());

    await jest.advanceTimersByTimeAsync(14_999);
    expect(signal!.aborted).toBe(false);
    await jest.advanceTimersByTimeAsync(1);

    expect(await error).toMatchObject({ token: 'unreachable', status: 0, isUnanswered: true });
    expect(signal!.aborted).toBe(true);
    jest.useRealTimers();
  });

  test('leaves no timer behind, and neither does an answer', async () => {
    jest.useFakeTimers();
    await api.models();
    gateway.answers = [() => Promise.reject(new TypeError('Network request failed'))];
    await failure(api.models());
    await jest.advanceTimersByTimeAsync(0);

    expect(jest.getTimerCount()).toBe(0);
    jest.useRealTimers();
  });
});

describe('an expired session', () => {
  const expired = () => json(401, { code: 'PGRST303', message: 'JWT expired' });

  test('is refreshed, and the request repeated with the new one', async () => {
    gateway.answers = [expired, () => json(200, [])];

    await api.enqueue(ASKED);

    const [first, refresh, second] = gateway.requests;
    expect(gateway.requests).toHaveLength(3);
    expect(refresh!.body).toEqual({ refresh_token: 'refresh old' });
    expect(second).toMatchObject({ method: 'POST', path: first!.path, body: first!.body });
    expect(second!.token).toBe(NEW.access_token);
  });

  test('is refreshed for reads too', async () => {
    gateway.answers = [expired, () => json(200, [])];

    await api.activeJobs([JOB]);

    const query = { job_ids: `{${JOB}}` };
    expect(gateway.last()).toMatchObject({ method: 'GET', query });
  });

  test('is refreshed once, not endlessly; then the request waits for a session', async () => {
    gateway.answers = [expired];

    const error = await failure(api.models());

    expect(error).toMatchObject({ status: 401, token: 'JWT expired', isUnanswered: true });
    expect(gateway.requests).toHaveLength(3);
  });

  test('that cannot be refreshed is not tried again', async () => {
    gateway.answers = [expired];
    gateway.refresh = () => json(400, { code: 'refresh_token_not_found', msg: 'gone' });

    const error = await failure(api.models());

    expect(error).toMatchObject({ status: 401, isUnanswered: true });
    expect(gateway.paths()).toEqual(['/rest/v1/rpc/list_models', '/auth/v1/token']);
  });

  test('nobody is signed in: nothing to refresh', async () => {
    api = connect(null);
    gateway.answers = [() => json(401, { code: 'PT401', message: 'not_authenticated' })];

    const error = await failure(api.models());

    expect(error).toMatchObject({ status: 401, token: 'not_authenticated', isUnanswered: true });
    expect(gateway.requests).toHaveLength(1);
  });
});

describe('a source picture', () => {
  const upload = () =>
    api.uploadSource('ada/key', { uri: 'file:///cat.jpg', contentType: 'image/jpeg' });
  const deviceFetch = jest.spyOn(globalThis, 'fetch');

  beforeEach(() => void deviceFetch.mockImplementation(async () => new Response('a cat')));
  afterAll(() => deviceFetch.mockRestore());

  test('is stored in the bucket inputs as it is, in the place of an earlier try', async () => {
    gateway.answers = [() => json(200, { Key: 'inputs/ada/key', Id: '1' })];

    await upload();

    const { method, path, headers, body } = gateway.last();
    expect([method, path]).toEqual(['POST', '/storage/v1/object/inputs/ada/key']);
    expect(headers.get('content-type')).toBe('image/jpeg');
    expect(headers.get('x-upsert')).toBe('true');
    expect(await new Response(body as ArrayBuffer).text()).toBe('a cat');
  });

  test.each<[string, () => Promise<Response>]>([
    ['is gone', () => Promise.reject(new TypeError('Network request failed'))],
    ['cannot be read', async () => brokenFile()],
  ])('that %s is lost', async (_, read) => {
    deviceFetch.mockImplementation(read);

    const error = await failure(upload());

    expect(error).toMatchObject({ token: 'source_lost', isUnanswered: false });
    expect(gateway.requests).toEqual([]);
  });

  test.each([
    [400, { statusCode: '415', error: 'invalid_mime_type', message: 'mime type not supported' }],
    [413, { statusCode: '413', error: 'Payload too large', message: 'too large' }],
  ])('may be refused (%i)', async (status, body) => {
    gateway.answers = [() => json(status, body)];

    const error = await failure(upload());

    expect(error).toMatchObject({
      token: 'source_refused',
      status,
      detail: body.message,
      isUnanswered: false,
    });
  });

  test.each<[string, Answer]>([
    ['a broken connection', () => Promise.reject(new TypeError('Network request failed'))],
    ['an error of the storage', () => json(500, { message: 'no' })],
    ['an error of a proxy', () => text(503, '<html>')],
    ['too many', () => json(429, { message: 'slow down' })],
    ['a page of a hotel', () => text(200, '<html>')],
    ['an expired session', () => json(401, { message: 'jwt expired' })],
  ])('is sent again after %s', async (_, answer) => {
    gateway.answers = [answer];

    const error = await failure(upload());

    expect(error).toBeInstanceOf(DarkroomError);
    expect(error.isUnanswered).toBe(true);
  });

  test('without an answer is given up after two minutes', async () => {
    jest.useFakeTimers();
    gateway.answers = [() => new Promise(() => {})];
    const error = failure(upload());

    await jest.advanceTimersByTimeAsync(120_000);

    expect(await error).toMatchObject({ token: 'unreachable', isUnanswered: true });
    jest.useRealTimers();
  });
});

function brokenFile(): Response {
  const file = new Response('');
  file.arrayBuffer = () => Promise.reject(new TypeError('cannot be read'));
  return file;
}
