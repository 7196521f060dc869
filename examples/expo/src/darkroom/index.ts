export { createApi, DarkroomError, type Api, type Client } from './api';
export type { Database, Json } from './database.types';
export { listen } from './realtime';
export { GenerationStore, type Environment, type Generation, type Snapshot, type Source } from './store';
export type { Entitlement, Job, JobImage, Model, Params } from './types';
export { useGenerations } from './useGenerations';
