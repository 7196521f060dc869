import { registerRootComponent } from 'expo';
import { InteractionManager } from 'react-native';

import { App } from './App';

// In a browser a list draws further rows when the browser is idle, which a busy one never is.
InteractionManager.setDeadline(100);

registerRootComponent(App);
