/** Where one signs in, makes an account, or comes back without the password. */
import type { AuthError } from '@supabase/supabase-js';
import { useRef, useState } from 'react';
import {
  KeyboardAvoidingView,
  ScrollView,
  StyleSheet,
  Text,
  TextInput,
  type TextInputProps,
  View,
} from 'react-native';

import { supabase } from '../supabase';
import { signOut } from '../useUser';
import { Button } from './Button';
import { color, field, space } from './theme';
import { signInProblem } from './words';

const SHORTEST_PASSWORD = 6; // Supabase's own, unless the project asks for more

/** The code comes by mail: the template "Reset password" has to show `{{ .Token }}`. */
const STEPS = {
  signIn: { title: 'Sign in', action: 'Sign in' },
  signUp: { title: 'Create an account', action: 'Create account' },
  forgot: { title: 'Reset your password', action: 'Send a code' },
  code: { title: 'Look into your mail', action: 'Continue' },
  renew: { title: 'Choose a new password', action: 'Save' },
};
type Step = keyof typeof STEPS;

/** Begins with `renew` for who is signed in by a code, to choose a new password. */
export function SignIn({ first = 'signIn' }: { first?: 'signIn' | 'renew' }) {
  const [step, setStep] = useState<Step>(first);
  const [email, setEmail] = useState('');
  const [password, setPassword] = useState('');
  const [code, setCode] = useState('');
  const [problem, setProblem] = useState('');
  const [isBusy, setIsBusy] = useState(false);
  const hasMoved = useRef(false); // then the first field has the focus

  function go(to: Step, why = '') {
    hasMoved.current = true;
    setStep(to);
    setProblem(why);
  }

  /** What is missing before anybody is asked. */
  function missing(): string | null {
    if (step !== 'renew' && !email.includes('@')) return 'Enter your email address.';
    if (step === 'signIn') return password ? null : 'Enter your password.';
    if (step === 'code') return code.trim() ? null : 'Enter the code from the mail.';
    if (step === 'forgot' || password.length >= SHORTEST_PASSWORD) return null;
    return `A password has ${SHORTEST_PASSWORD} characters or more.`;
  }

  /** Whoever is signed in by this leaves this screen by it: see useUser.ts. */
  async function ask(): Promise<AuthError | null> {
    const { auth } = supabase;
    const address = email.trim();
    if (step === 'signIn') {
      return (await auth.signInWithPassword({ email: address, password })).error;
    }
    if (step === 'signUp') {
      const { data, error } = await auth.signUp({ email: address, password });
      if (!error && !data.session) go('signIn', 'Confirm your address: a mail is on its way.');
      return error;
    }
    if (step === 'forgot') {
      const { error } = await auth.resetPasswordForEmail(address);
      if (!error) go('code');
      return error;
    }
    if (step === 'code') {
      const token = code.trim();
      return (await auth.verifyOtp({ email: address, token, type: 'recovery' })).error;
    }
    return (await auth.updateUser({ password })).error;
  }

  async function submit() {
    const lack = missing();
    setProblem(lack ?? '');
    if (lack || isBusy) return;
    setIsBusy(true);
    const error = await ask();
    setIsBusy(false);
    if (error) setProblem(signInProblem(error));
  }

  const { title, action } = STEPS[step];
  const isNew = step === 'signUp' || step === 'renew';
  return (
    <KeyboardAvoidingView behavior='padding' role='main' style={styles.page}>
      <ScrollView contentContainerStyle={styles.scroll} keyboardShouldPersistTaps='handled'>
        <View key={step} style={styles.form}>
          <Text aria-level={1} role='heading' style={styles.name}>Darkroom</Text>
          <Text style={styles.motto}>Ask for a picture. Come back for it.</Text>
          <Text aria-level={2} role='heading' style={styles.title}>{title}</Text>
          {step === 'forgot' && <Text style={styles.text}>A code is sent to your address.</Text>}
          {step === 'code' && (
            <Text style={styles.text}>
              If there is an account with {email.trim()}, a code is on its way.
            </Text>
          )}
          {step !== 'code' && step !== 'renew' && (
            <Field
              label='Email'
              autoFocus={hasMoved.current}
              autoCapitalize='none'
              autoComplete='email'
              inputMode='email'
              onChangeText={setEmail}
              onSubmitEditing={() => void submit()}
              value={email}
            />
          )}
          {step === 'code' && (
            <Field
              label='Code'
              autoFocus
              autoComplete='one-time-code'
              inputMode='numeric'
              onChangeText={setCode}
              onSubmitEditing={() => void submit()}
              value={code}
            />
          )}
          {(step === 'signIn' || isNew) && (
            <Field
              label={isNew ? `New password, ${SHORTEST_PASSWORD} characters or more` : 'Password'}
              autoFocus={step === 'renew'}
              autoCapitalize='none'
              autoComplete={isNew ? 'new-password' : 'current-password'}
              onChangeText={setPassword}
              onSubmitEditing={() => void submit()}
              secureTextEntry
              value={password}
            />
          )}
          {problem !== '' && <Text accessibilityRole='alert' style={styles.problem}>{problem}
          </Text>}
          <Button kind='main' title={action} isDisabled={isBusy} onPress={() => void submit()} />
          {step === 'signIn'
            ? (
              <>
                <Button
                  title='Forgot your password?'
                  style={styles.center}
                  onPress={() => go('forgot')}
                />
                <View style={styles.rule} />
                <Button
                  kind='choice'
                  title='Create an account'
                  onPress={() => go('signUp')}
                />
              </>
            )
            : (
              <Button
                title='Back to sign in'
                style={styles.center}
                onPress={() => (step === 'renew' ? void signOut() : go('signIn'))}
              />
            )}
        </View>
      </ScrollView>
    </KeyboardAvoidingView>
  );
}

function Field({ label, ...input }: TextInputProps & { label: string }) {
  return (
    <View style={styles.field}>
      <Text aria-hidden style={styles.label}>{label}</Text>
      <TextInput accessibilityLabel={label} style={styles.input} {...input} />
    </View>
  );
}

const styles = StyleSheet.create({
  page: { flex: 1 },
  scroll: { alignItems: 'center', flexGrow: 1, justifyContent: 'center', padding: space.l },
  form: { gap: space.m, maxWidth: 360, width: '100%' },
  name: { color: color.light, fontSize: 40, fontWeight: '700', letterSpacing: -1 },
  motto: { color: color.quiet, fontSize: 16, marginBottom: space.l },
  title: { color: color.text, fontSize: 20, fontWeight: '600' },
  text: { color: color.quiet, fontSize: 15, lineHeight: 21 },
  field: { gap: space.s },
  label: { color: color.text, fontSize: 14 },
  input: field,
  problem: { color: color.glow, fontSize: 14, lineHeight: 20 },
  center: { alignItems: 'center' },
  rule: { backgroundColor: color.edge, height: 1, marginBottom: space.s },
});
