/** What is about to be asked for: which model, what is sent to it, what is remembered. */
import { useCallback, useEffect, useState } from 'react';

import type { Entitlement, Environment, Generation, Model, Params, Source } from './darkroom';
import { priceOf } from './darkroom';

/** A picture to start from: on the device, or a stored one as params name it. */
export type Start = Pick<Source, 'uri' | 'contentType'> | { path: string };

export interface Draft {
  prompt: string;
  /** Empty until one was chosen. */
  modelId: string;
  shape: Shape;
  start: Start | null;
}

// A size of a model's own is not needed: it is given the nearest to this that it knows.
export const SHAPES = {
  Square: { width: 1024, height: 1024 },
  Portrait: { width: 832, height: 1216 },
  Landscape: { width: 1216, height: 832 },
};
export type Shape = keyof typeof SHAPES;

/** What models call an input that says a shape, one way or the other. */
const SHAPED = /^(width|aspect_ratio|(image_|target_)?(size|resolution)|image_dimensions)$/;
export const takesShape = (model: Model) => Object.keys(model.inputs).some((n) => SHAPED.test(n));
export const takesPicture = (model: Model) => model.image_inputs.length > 0;

export const canUse = (model: Model, by: Entitlement | null) =>
  model.paused_until === null && (!model.requires_paid || by?.plan === 'paid');

/** The models there are for this draft: first those that can be used, the cheapest first. */
export function offered(models: readonly Model[], to: Entitlement | null, { start }: Draft) {
  return models
    .filter((model) => !start || takesPicture(model))
    .toSorted((a, b) =>
      +canUse(b, to) - +canUse(a, to) ||
      priceOf(a, to) - priceOf(b, to) ||
      a.title.localeCompare(b.title)
    );
}

/** Of those offered the one that was chosen, if it can be used; else the cheapest. */
export const modelOf = ({ modelId }: Draft, among: readonly Model[], by: Entitlement | null) =>
  among.find((model) => model.id === modelId && canUse(model, by)) ?? among[0];

/** What to ask this model for. */
export function request({ shape, start }: Draft, model: Model) {
  const size: Params = takesShape(model) ? SHAPES[shape] : {};
  const input = model.image_inputs[0];
  if (!start || !input) return { params: size, source: null };
  const isList = (model.inputs[input] as { type?: string } | undefined)?.type === 'array';
  if ('uri' in start) return { params: size, source: { ...start, input, isList } };
  return { params: { ...size, [input]: isList ? [start.path] : start.path }, source: null };
}

/** What asked for this, to be changed and asked again; `from` is one of its own pictures. */
export function draftOf(
  { job, source }: Generation,
  models: readonly Model[],
  from?: { path: string },
): Draft {
  const inputs = models.find(({ id }) => id === job.model)?.image_inputs ?? [];
  const [path] = inputs.flatMap((name) => job.params[name] ?? []);
  const known = source ?? (typeof path === 'string' ? { path } : null);
  const start = from ? { path: `generations/${from.path}` } : known;
  return { prompt: job.prompt, modelId: job.model, shape: shapeOf(job.params), start };
}

function shapeOf({ aspect_ratio, width, height }: Params): Shape {
  const [, across, down] = /^(\d+):(\d+)$/.exec(String(aspect_ratio)) ?? ['', width, height];
  if (Number(across) > Number(down)) return 'Landscape';
  return Number(across) < Number(down) ? 'Portrait' : 'Square';
}

/** The draft of one user; the model that was chosen last is remembered on the device. */
export function useDraft(storage: Environment['storage'], userId: string) {
  const memory = `darkroom.${userId}.model`; // a name that is forgotten with the user
  const [draft, setDraft] = useState<Draft>(
    { prompt: '', modelId: '', shape: 'Square', start: null },
  );
  const change = useCallback((news: Partial<Draft>) => setDraft((d) => ({ ...d, ...news })), []);
  useEffect(() => {
    const recall = async () => (await storage.getItem(memory)) ?? '';
    void recall().catch(() => '').then((id) =>
      setDraft((d) => ({ ...d, modelId: d.modelId || id }))
    );
  }, [storage, memory]);
  const chooseModel = ({ id }: Model) => {
    change({ modelId: id });
    void Promise.resolve(storage.setItem(memory, id)).catch(() => undefined);
  };
  return { draft, change, chooseModel };
}
