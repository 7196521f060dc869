export * from './api';
export type { Database, Json } from './database.types';
export * from './realtime';
export * from './store';
export type { Entitlement, Job, JobImage, Model, Params } from './types';
export * from './useGenerations';
export * from './usePicture';
