/** Where a browser keeps the session: localStorage, as it has nothing that is more secret. */
export { default as sessionStorage } from '@react-native-async-storage/async-storage';
