import { StatusBar } from 'react-native';
import { SafeAreaProvider, SafeAreaView } from 'react-native-safe-area-context';

import { api } from './src/supabase';
import { setClock } from './src/ui/clock';
import { SignIn } from './src/ui/SignIn';
import { Studio } from './src/ui/Studio';
import { color } from './src/ui/theme';
import { useUser } from './src/useUser';

// Warms the path to the database while the app draws itself. Nobody waits for it.
api.ping().then(({ server_time }) => setClock(server_time), () => undefined);

export function App() {
  const user = useUser();
  return (
    <SafeAreaProvider style={{ backgroundColor: color.ground }}>
      <SafeAreaView style={{ flex: 1, backgroundColor: color.ground }}>
        <StatusBar barStyle='light-content' />
        {user === null && <SignIn />}
        {user?.isRecovering && <SignIn key='renew' first='renew' />}
        {user && !user.isRecovering && <Studio key={user.id} user={user} />}
      </SafeAreaView>
    </SafeAreaProvider>
  );
}
