import { useState } from 'react';
import { StyleSheet, Text, TextInput, View } from 'react-native';

import { supabase } from '../supabase';
import { Button } from './Button';
import { color, field, space } from './theme';

export function SignIn() {
  const [email, setEmail] = useState('');
  const [password, setPassword] = useState('');
  const [problem, setProblem] = useState('');
  const [isBusy, setIsBusy] = useState(false);

  async function enter(how: 'signUp' | 'signInWithPassword') {
    setIsBusy(true);
    setProblem('');
    const { data, error } = await supabase.auth[how]({ email: email.trim(), password });
    setIsBusy(false);
    if (error) setProblem(error.status ? error.message : 'The server cannot be reached right now.');
    else if (!data.session) setProblem('Look into your mail to confirm the address, then sign in.');
  }

  const isReady = email.includes('@') && password.length >= 6 && !isBusy;
  return (
    <View style={styles.page}>
      <View style={styles.form}>
        <Text style={styles.title}>Darkroom</Text>
        <Text style={styles.text}>Ask for a picture. Come back for it.</Text>
        <TextInput
          accessibilityLabel='Email'
          autoCapitalize='none'
          autoComplete='email'
          inputMode='email'
          onChangeText={setEmail}
          placeholder='Email'
          placeholderTextColor={color.quiet}
          style={styles.field}
          value={email}
        />
        <TextInput
          accessibilityLabel='Password'
          autoComplete='password'
          onChangeText={setPassword}
          onSubmitEditing={() => isReady && void enter('signInWithPassword')}
          placeholder='Password, six characters or more'
          placeholderTextColor={color.quiet}
          secureTextEntry
          style={styles.field}
          value={password}
        />
        <Button
          kind='main'
          title='Sign in'
          isDisabled={!isReady}
          onPress={() => void enter('signInWithPassword')}
        />
        <Button
          title='Create an account'
          style={styles.second}
          isDisabled={!isReady}
          onPress={() => void enter('signUp')}
        />
        <Text accessibilityRole='alert' style={styles.problem}>
          {problem}
        </Text>
      </View>
    </View>
  );
}

const styles = StyleSheet.create({
  page: { alignItems: 'center', flex: 1, justifyContent: 'center', padding: space.l },
  form: { gap: space.m, maxWidth: 360, width: '100%' },
  title: { color: color.light, fontSize: 40, fontWeight: '700', letterSpacing: -1 },
  text: { color: color.quiet, fontSize: 16, marginBottom: space.m },
  field,
  second: { alignItems: 'center', padding: space.m },
  problem: { color: color.glow, fontSize: 14, minHeight: 40, textAlign: 'center' },
});
