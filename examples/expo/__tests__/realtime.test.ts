/** Hints over a real supabase-js client, from a server that speaks Phoenix's protocol in memory. */
import { createClient } from '@supabase/supabase-js';

import { type Client, listen } from '../src/darkroom';

const BROADCASTS = 'realtime:user:ada';
const CHANGES = 'realtime:generations:ada';

type Message = [string | null, string | null, string, string, Record<string, unknown>];
interface Join {
  topic: string;
  config: { private: boolean; postgres_changes: object[] };
  access_token: string;
}

class FakeRealtime {
  /** What it does when somebody joins. */
  rules: Record<string, 'ok' | 'error' | 'close' | 'silence'> = {};
  joins: Join[] = [];
  sockets: FakeSocket[] = [];
  private readonly joined = new Map<string, string | null>();

  topics = () => this.joins.map(({ topic }) => topic);
  members = () => [...this.joined.keys()];

  receive(socket: FakeSocket, [joinRef, ref, topic, event, payload]: Message): void {
    const reply = (status: string, response = {}) =>
      socket.deliver([joinRef, ref, topic, 'phx_reply', { status, response }]);
    if (event === 'phx_leave') this.joined.delete(topic);
    if (event !== 'phx_join') return reply('ok');
    const { config, access_token } = payload as unknown as Join;
    this.joins.push({ topic, config, access_token });
    const rule = this.rules[topic] ?? 'ok';
    if (rule === 'error') reply('error', { reason: 'Unauthorized' });
    if (rule === 'close') socket.deliver([joinRef, ref, topic, 'phx_close', {}]);
    if (rule !== 'ok') return;
    this.joined.set(topic, joinRef);
    const bindings = config.postgres_changes.map((binding) => ({ id: 1, ...binding }));
    reply('ok', { postgres_changes: bindings });
  }

  send(topic: string, event: string, payload: Record<string, unknown>): void {
    if (!this.joined.has(topic)) return;
    this.sockets.at(-1)!.deliver([this.joined.get(topic)!, null, topic, event, payload]);
  }

  broadcast(event = 'generation'): void {
    const payload = { job_id: 'job', status: 'completed' };
    this.send(BROADCASTS, 'broadcast', { type: 'broadcast', event, payload });
  }

  update(): void {
    const data = {
      type: 'UPDATE',
      schema: 'public',
      table: 'generations',
      errors: null,
      commit_timestamp: '2026-11-24T00:00:00Z',
      columns: [],
      record: { id: 'job' },
    };
    this.send(CHANGES, 'postgres_changes', { ids: [1], data });
  }

  drop(): void {
    this.joined.clear();
    this.sockets.at(-1)!.close();
  }
}

class FakeSocket {
  static server: FakeRealtime;
  readyState = 0;
  binaryType = '';
  onopen: (() => void) | null = null;
  onclose: ((event: object) => void) | null = null;
  onerror: ((event: object) => void) | null = null;
  onmessage: ((event: { data: string }) => void) | null = null;

  constructor(readonly url: string) {
    FakeSocket.server.sockets.push(this);
    setTimeout(() => ((this.readyState = 1), this.onopen?.()), 5);
  }

  send(text: string): void {
    setTimeout(() => FakeSocket.server.receive(this, JSON.parse(text) as Message), 5);
  }

  deliver(message: Message): void {
    if (this.readyState === 1) this.onmessage?.({ data: JSON.stringify(message) });
  }

  close(): void {
    this.readyState = 3;
    this.onclose?.({ code: 1006, reason: '', wasClean: false });
  }
}

let server: FakeRealtime;
let supabase: Client;
const hint = jest.fn<void, []>();

const after = (ms: number) => jest.advanceTimersByTimeAsync(ms);
const listening = async () => {
  const stop = listen(supabase, 'ada', hint);
  await after(100);
  return stop;
};

beforeEach(() => {
  jest.useFakeTimers();
  hint.mockReset();
  FakeSocket.server = server = new FakeRealtime();
  supabase = createClient('http://127.0.0.1:1', 'anon-key', {
    auth: { persistSession: false, autoRefreshToken: false },
    accessToken: async () => 'token of ada',
    realtime: { transport: FakeSocket as never },
  });
});

afterEach(() => supabase.realtime.disconnect());

test('begins with the private channel of the user, as the user', async () => {
  await listening();

  expect(server.topics()).toEqual([BROADCASTS]);
  expect(server.joins[0]).toMatchObject({
    access_token: 'token of ada',
    config: { private: true },
  });
});

test('hints when it has begun: what happened before was missed', async () => {
  await listening();

  expect(hint).toHaveBeenCalledTimes(1);
});

test('hints when a generation was broadcast, and for nothing else', async () => {
  await listening();
  hint.mockReset();

  server.broadcast();
  server.broadcast('another event');

  expect(hint.mock.calls).toEqual([[]]);
});

test.each(['error', 'close', 'silence'] as const)(
  'goes over to changes of the table if broadcasts answer with %s',
  async (rule) => {
    server.rules = { [BROADCASTS]: rule };

    await listening();
    await after(11_000);

    expect(server.topics()).toEqual([BROADCASTS, CHANGES]);
    expect(server.joins[1]!.config.postgres_changes).toEqual([
      { event: 'UPDATE', schema: 'public', table: 'generations', filter: 'user_id=eq.ada' },
    ]);
    expect(supabase.getChannels().map(({ topic }) => topic)).toEqual([CHANGES]);
    expect(hint).toHaveBeenCalledTimes(1);
  },
);

test('hints when the table has changed', async () => {
  server.rules = { [BROADCASTS]: 'error' };
  await listening();
  hint.mockReset();

  server.update();

  expect(hint.mock.calls).toEqual([[]]);
});

test.each(['error', 'close', 'silence'] as const)(
  'gives up if neither works (%s), and leaves no channel behind',
  async (rule) => {
    server.rules = { [BROADCASTS]: rule, [CHANGES]: rule };

    await listening();
    await after(300_000);

    expect(server.topics()).toEqual([BROADCASTS, CHANGES]);
    expect(supabase.getChannels()).toEqual([]);
    expect(hint).not.toHaveBeenCalled();
  },
);

test('gives up if the token cannot be set', async () => {
  jest.spyOn(supabase.realtime, 'setAuth').mockRejectedValue(new Error('no session'));

  await listening();

  expect(server.joins).toEqual([]);
});

test('that dropped while it was live comes back by itself, and hints', async () => {
  await listening();
  hint.mockReset();

  server.drop();
  await after(15_000);

  expect(server.topics()).toEqual([BROADCASTS, BROADCASTS]);
  expect(hint).toHaveBeenCalledTimes(1);
  server.broadcast();
  expect(hint).toHaveBeenCalledTimes(2);
});

test('stops: leaves the channel and hints no more', async () => {
  const stop = await listening();
  hint.mockReset();

  stop();
  await after(100);
  server.broadcast();

  expect(server.members()).toEqual([]);
  expect(supabase.getChannels()).toEqual([]);
  expect(hint).not.toHaveBeenCalled();
});

test('stopped before it knows the token never begins', async () => {
  const stop = listen(supabase, 'ada', hint);

  stop();
  await after(20_000);

  expect(server.joins).toEqual([]);
  expect(supabase.getChannels()).toEqual([]);
});

test('stopped while it tries does not go on trying', async () => {
  server.rules = { [BROADCASTS]: 'silence' };
  const stop = await listening();

  stop();
  await after(60_000);

  expect(server.topics()).toEqual([BROADCASTS]);
  expect(supabase.getChannels()).toEqual([]);
});

test('stopped and begun anew at once listens', async () => {
  const stop = await listening();
  stop();

  await listening();
  hint.mockReset();
  server.broadcast();

  expect(server.topics()).toEqual([BROADCASTS, BROADCASTS]);
  expect(supabase.getChannels()).toHaveLength(1);
  expect(hint).toHaveBeenCalledTimes(1);
});
