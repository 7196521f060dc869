-- What another app has in the database before Darkroom comes: rows, rights, rules, users and files.
-- Run by the role that is going to install Darkroom.

create table public.profiles (
  id uuid primary key references auth.users on delete cascade,
  handle text not null unique
);
alter table public.profiles enable row level security;
create policy "Users see their profile" on public.profiles
for select to authenticated using (id = (select auth.uid()));
grant select on public.profiles to authenticated, anon;

create table public.posts (
  id bigint generated always as identity primary key,
  user_id uuid references auth.users,
  body text
);
grant all on public.posts to service_role;

create schema app;
create sequence app.numbers start 7;
create view app.handles as select handle from public.profiles;
create function app.make_profile() returns trigger
language plpgsql security definer set search_path = ''
as $$
begin
  insert into public.profiles (id, handle) values (new.id, left(new.id::text, 8));
  return new;
end;
$$;
create trigger make_profile after insert on auth.users
for each row execute function app.make_profile();

insert into auth.users (id) select gen_random_uuid() from generate_series(1, 3);
insert into public.posts (user_id, body) select id, 'hello' from auth.users;
insert into storage.buckets (id, name, public) values ('avatars', 'avatars', true);
insert into storage.objects (bucket_id, name)
select 'avatars', u.id || '/' || u.id || '/0.png' from auth.users as u;
create policy "Everybody sees avatars" on storage.objects
for select using (bucket_id = 'avatars');
alter publication supabase_realtime add table public.posts;

do $$
begin
  if to_regprocedure('cron.schedule(text, text, text)') is not null then
    perform cron.schedule('app', '0 4 * * *', 'select 1');
  end if;
end;
$$;
