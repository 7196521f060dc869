// The first render transforms React Native, which takes longer than Jest's usual five seconds.
module.exports = { preset: 'jest-expo', testMatch: ['**/*.test.ts?(x)'], testTimeout: 60_000 };
