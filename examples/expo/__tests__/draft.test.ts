/** What the composer asks for: which model, at what price, with what. */
import { act, renderHook } from '@testing-library/react-native';

import type { Generation, Model } from '../src/darkroom';
import { type Draft, draftOf, modelOf, offered, request, useDraft } from '../src/draft';
import { lacking, notice, signInProblem } from '../src/ui/words';
import { DEAR_MODEL, FakeServer, MODEL, PAID_MODEL, USER_ID } from './fakeServer';

const EMPTY: Draft = { prompt: '', modelId: '', shape: 'Square', start: null };
const BLIND: Model = { ...MODEL, id: 'blind', title: 'Blind', image_inputs: [] };
const PAUSED: Model = { ...MODEL, id: 'paused', price_credits: 0, paused_until: 'infinity' };
const SIZED: Model = { ...MODEL, inputs: { width: {}, height: {} } };
const LISTED: Model = {
  ...MODEL,
  image_inputs: ['image_input'],
  inputs: { size: {}, image_input: { type: 'array' } },
};

const server = new FakeServer();
const free = server.entitlement();
const paid = { ...free, plan: 'paid' };
const ids = (models: readonly Model[]) => models.map(({ id }) => id);
const chosen = (models: Model[], draft: Partial<Draft> = {}, by = free) => {
  const known = { ...EMPTY, ...draft };
  return modelOf(known, offered(models, by, known), by)?.id;
};

test('what can be used is offered first, the cheapest first, at the price of the plan', () => {
  const models = [PAUSED, PAID_MODEL, DEAR_MODEL, BLIND, { ...MODEL, paid_price_credits: 5 }];

  expect(ids(offered(models, free, EMPTY)).slice(0, 3)).toEqual(['blind', MODEL.id, 'dear']);
  expect(ids(offered(models, paid, EMPTY))).toEqual(['blind', 'paid', 'dear', MODEL.id, 'paused']);
});

test('without a choice the cheapest model that can be used is taken', () => {
  expect(chosen([DEAR_MODEL, PAUSED, MODEL, PAID_MODEL])).toBe(MODEL.id);
});

test.each([
  ['is there and can be used', [MODEL, DEAR_MODEL], {}, 'dear'],
  ['is paused', [MODEL, { ...DEAR_MODEL, paused_until: 'infinity' }], {}, MODEL.id],
  ['is for paid users', [MODEL, { ...DEAR_MODEL, requires_paid: true }], {}, MODEL.id],
  ['is no longer there', [MODEL], {}, MODEL.id],
  [
    'takes no picture to start from',
    [MODEL, { ...BLIND, id: 'dear' }],
    { start: { path: 'x' } },
    MODEL.id,
  ],
])('the chosen model, where it %s', (_, models, draft, taken) => {
  expect(chosen(models, { modelId: 'dear', ...draft })).toBe(taken);
});

test('no model at all is no model', () => {
  expect(chosen([])).toBeUndefined();
});

test('a picture to start from leaves the models that take one', () => {
  expect(ids(offered([BLIND, MODEL], free, { ...EMPTY, start: { path: 'x' } }))).toEqual([
    MODEL.id,
  ]);
});

test('only a model that takes a shape is asked for one', () => {
  const draft: Draft = { ...EMPTY, shape: 'Portrait' };

  expect(request(draft, SIZED).params).toEqual({ width: 832, height: 1216 });
  expect(request(draft, LISTED).params).toEqual({ width: 832, height: 1216 });
  expect(request(draft, MODEL).params).toEqual({});
});

test('a picture on the device is sent as source, a stored one by its path', () => {
  const picked = { uri: 'file:///a.png', contentType: 'image/png' };
  const stored = { path: 'generations/u/j/0.png' };

  expect(request({ ...EMPTY, start: picked }, MODEL)).toEqual({
    params: {},
    source: { ...picked, input: 'image', isList: false },
  });
  expect(request({ ...EMPTY, start: picked }, LISTED).source).toMatchObject({ isList: true });
  expect(request({ ...EMPTY, start: stored }, MODEL)).toEqual({
    params: { image: stored.path },
    source: null,
  });
  expect(request({ ...EMPTY, start: stored }, LISTED).params.image_input).toEqual([stored.path]);
});

const made = (params: Generation['job']['params'], more: Partial<Generation> = {}): Generation => {
  server.enqueue(MODEL.id, 'a fox', params, null);
  return { key: 'k', local: null, job: server.newest(), source: null, ...more };
};

test.each([
  [{ width: 1216, height: 832 }, 'Landscape'],
  [{ aspect_ratio: '9:16' }, 'Portrait'],
  [{ aspect_ratio: 'custom', width: 832, height: 1216 }, 'Portrait'],
  [{ aspect_ratio: '1:1' }, 'Square'],
  [{}, 'Square'],
])('what was asked with %j is edited as %s', (params, shape) => {
  expect(draftOf(made(params), [MODEL])).toEqual({
    prompt: 'a fox',
    modelId: MODEL.id,
    shape,
    start: null,
  });
});

test('what is edited starts from the picture it started from, or from its own', () => {
  const picked = { uri: 'file:///a.png', contentType: 'image/png', input: 'image', isList: false };
  const start = (...of: Parameters<typeof draftOf>) => draftOf(...of).start;

  expect(start(made({ image: 'u/k' }), [MODEL])).toEqual({ path: 'u/k' });
  expect(start(made({ image_input: ['u/k', 'u/l'] }), [LISTED])).toEqual({ path: 'u/k' });
  expect(start(made({ image: 'u/k' }, { source: picked }), [MODEL])).toBe(picked);
  expect(start(made({ image: 'u/k' }), [MODEL], { path: 'u/j/0.png' })).toEqual({
    path: 'generations/u/j/0.png',
  });
});

test('the chosen model is remembered on the device, for its user', async () => {
  const kept = new Map<string, string>();
  const storage = {
    getItem: async (name: string) => kept.get(name) ?? null,
    setItem: async (name: string, value: string) => void kept.set(name, value),
    removeItem: async (name: string) => void kept.delete(name),
    getAllKeys: async () => [...kept.keys()],
  };
  const open = async (userId: string) => {
    const screen = renderHook(() => useDraft(storage, userId));
    await act(async () => undefined);
    return screen.result;
  };
  const first = await open(USER_ID);
  act(() => first.current.chooseModel(DEAR_MODEL));

  expect(first.current.draft.modelId).toBe('dear');
  expect((await open(USER_ID)).current.draft.modelId).toBe('dear');
  expect((await open('another')).current.draft.modelId).toBe('');
});

test('what is missing is said before the press, once the balance is known', () => {
  expect(lacking(50, 7)).toBe('Needs 50, you have 7');
  expect(lacking(7, 7)).toBeNull();
  expect(lacking(50, null)).toBeNull();
});

test('why a model cannot be used is said', () => {
  const tonight = new Date(new Date().setHours(23, 59)).toISOString();
  const later = new Date(2130, 0, 1).toISOString();

  expect(notice(PAID_MODEL, free)).toBe('For paid users');
  expect(notice(PAID_MODEL, paid)).toBeNull();
  expect(notice(PAUSED, paid)).toBe('Paused');
  expect(notice({ ...MODEL, paused_until: tonight }, free)).toBe('Paused until 23:59');
  expect(notice({ ...MODEL, paused_until: later }, free)).toBe('Paused until 1 January');
});

test.each([
  [{ code: 'invalid_credentials', status: 400, message: 'Invalid' }, /wrong/],
  [{ code: 'new_rule', status: 422, message: 'A digit is missing.' }, /A digit is missing/],
  [{ status: 0, message: 'Network request failed' }, /cannot be reached/],
  [{ status: 502, message: '{}' }, /cannot be reached/],
])('%j is told in plain words', (error, words) => {
  expect(signInProblem(error as Parameters<typeof signInProblem>[0])).toMatch(words);
});
