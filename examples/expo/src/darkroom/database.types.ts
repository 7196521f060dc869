// Built from the migrations by `make types`: do not edit.
// deno-fmt-ignore-file
export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  
  "public": {
          Tables: {
            "batches": {
                  Row: {
                    "created_at": string,"id": string,"idempotency_key": string | null,"job_ids": (string)[],"request_hash": string,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"idempotency_key"?: string | null,"job_ids"?: (string)[],"request_hash": string,"user_id": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"idempotency_key"?: string | null,"job_ids"?: (string)[],"request_hash"?: string,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"credit_ledger": {
                  Row: {
                    "amount": number,"balance_after": number,"bucket_id": number | null,"created_at": string,"debt": number,"external_id": string | null,"generation_id": string | null,"id": number,"kind": string,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "amount": number,"balance_after": number,"bucket_id"?: number | null,"created_at"?: string,"debt"?: number,"external_id"?: string | null,"generation_id"?: string | null,"id"?: never,"kind": string,"user_id": string
                  }
                  Update: {
                    "amount"?: number,"balance_after"?: number,"bucket_id"?: number | null,"created_at"?: string,"debt"?: number,"external_id"?: string | null,"generation_id"?: string | null,"id"?: never,"kind"?: string,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"credit_products": {
                  Row: {
                    "credits": number,"credits_end": boolean,"grace": string,"grants_changes": boolean,"makes_paid": boolean,"period": string | null,"priority": number,"product_id": string,"provider": string,"rollover_cap": number | null,"trial_credits": number
                  }
                  ComputedFields: never
                  Insert: {
                    "credits": number,"credits_end"?: boolean,"grace"?: string,"grants_changes"?: boolean,"makes_paid"?: boolean,"period"?: string | null,"priority"?: number,"product_id": string,"provider": string,"rollover_cap"?: number | null,"trial_credits"?: number
                  }
                  Update: {
                    "credits"?: number,"credits_end"?: boolean,"grace"?: string,"grants_changes"?: boolean,"makes_paid"?: boolean,"period"?: string | null,"priority"?: number,"product_id"?: string,"provider"?: string,"rollover_cap"?: number | null,"trial_credits"?: number
                  }
                  Relationships: [
                    
                  ]
                },"entitlements": {
                  Row: {
                    "blocked_until": string | null,"created_at": string,"credits": number,"credits_end_at": string | null,"day_burned": number,"day_jobs": number,"day_started_at": string,"debt": number,"is_guest": boolean,"last_fair_key": number,"ledger_after": number,"minute_jobs": number,"minute_started_at": string,"paid_until": string | null,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "blocked_until"?: string | null,"created_at"?: string,"credits"?: number,"credits_end_at"?: string | null,"day_burned"?: number,"day_jobs"?: number,"day_started_at"?: string,"debt"?: number,"is_guest"?: boolean,"last_fair_key"?: number,"ledger_after"?: number,"minute_jobs"?: number,"minute_started_at"?: string,"paid_until"?: string | null,"user_id": string
                  }
                  Update: {
                    "blocked_until"?: string | null,"created_at"?: string,"credits"?: number,"credits_end_at"?: string | null,"day_burned"?: number,"day_jobs"?: number,"day_started_at"?: string,"debt"?: number,"is_guest"?: boolean,"last_fair_key"?: number,"ledger_after"?: number,"minute_jobs"?: number,"minute_started_at"?: string,"paid_until"?: string | null,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"generation_tags": {
                  Row: {
                    "generation_id": string,"tag": string,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "generation_id": string,"tag": string,"user_id": string
                  }
                  Update: {
                    "generation_id"?: string,"tag"?: string,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"generations": {
                  Row: {
                    "alias_id": string | null,"batch_id": string | null,"created_at": string,"deleted_at": string | null,"error_code": string | null,"error_message": string | null,"finished_at": string | null,"id": string,"idempotency_key": string | null,"image_count": number,"input": NonNullable<Json>,"is_favorite": boolean,"model_id": string,"price_credits": number,"prompt": string,"provider_input": NonNullable<Json>,"queue_distance": number | null,"refund_percent": number | null,"retry_of": string | null,"started_at": string | null,"status": string,"tags": (string)[],"updated_at": string,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "alias_id"?: string | null,"batch_id"?: string | null,"created_at"?: string,"deleted_at"?: string | null,"error_code"?: string | null,"error_message"?: string | null,"finished_at"?: string | null,"id"?: string,"idempotency_key"?: string | null,"image_count": number,"input": NonNullable<Json>,"is_favorite"?: boolean,"model_id": string,"price_credits": number,"prompt": string,"provider_input": NonNullable<Json>,"queue_distance"?: number | null,"refund_percent"?: number | null,"retry_of"?: string | null,"started_at"?: string | null,"status"?: string,"tags"?: (string)[],"updated_at"?: string,"user_id": string
                  }
                  Update: {
                    "alias_id"?: string | null,"batch_id"?: string | null,"created_at"?: string,"deleted_at"?: string | null,"error_code"?: string | null,"error_message"?: string | null,"finished_at"?: string | null,"id"?: string,"idempotency_key"?: string | null,"image_count"?: number,"input"?: NonNullable<Json>,"is_favorite"?: boolean,"model_id"?: string,"price_credits"?: number,"prompt"?: string,"provider_input"?: NonNullable<Json>,"queue_distance"?: number | null,"refund_percent"?: number | null,"retry_of"?: string | null,"started_at"?: string | null,"status"?: string,"tags"?: (string)[],"updated_at"?: string,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"image_likes": {
                  Row: {
                    "created_at": string,"generation_id": string,"position": number,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"generation_id": string,"position": number,"user_id": string
                  }
                  Update: {
                    "created_at"?: string,"generation_id"?: string,"position"?: number,"user_id"?: string
                  }
                  Relationships: [
                    
                  ]
                },"images": {
                  Row: {
                    "blurhash": string | null,"bytes": number,"content_type": string,"created_at": string,"generation_id": string,"height": number | null,"merged_from": string | null,"position": number,"preview_path": string | null,"share_id": string | null,"shows_prompt": boolean,"storage_path": string,"user_id": string,"width": number | null
                  }
                  ComputedFields: never
                  Insert: {
                    "blurhash"?: string | null,"bytes": number,"content_type": string,"created_at"?: string,"generation_id": string,"height"?: number | null,"merged_from"?: string | null,"position": number,"preview_path"?: string | null,"share_id"?: string | null,"shows_prompt"?: boolean,"storage_path": string,"user_id": string,"width"?: number | null
                  }
                  Update: {
                    "blurhash"?: string | null,"bytes"?: number,"content_type"?: string,"created_at"?: string,"generation_id"?: string,"height"?: number | null,"merged_from"?: string | null,"position"?: number,"preview_path"?: string | null,"share_id"?: string | null,"shows_prompt"?: boolean,"storage_path"?: string,"user_id"?: string,"width"?: number | null
                  }
                  Relationships: [
                    
                  ]
                },"model_aliases": {
                  Row: {
                    "id": string,"model_id": string,"weight": number
                  }
                  ComputedFields: never
                  Insert: {
                    "id": string,"model_id": string,"weight"?: number
                  }
                  Update: {
                    "id"?: string,"model_id"?: string,"weight"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "model_aliases_model_id_fkey"
      columns: ["model_id"]
isOneToOne: false
      referencedRelation: "models"
      referencedColumns: ["id"]
    }
                  ]
                },"models": {
                  Row: {
                    "client_inputs": (string)[],"cost_unit": string | null,"cost_usd": number | null,"deadline": string,"default_input": NonNullable<Json>,"highest_seed": number | null,"id": string,"image_count_input": string | null,"image_inputs": (string)[],"input_schema": NonNullable<Json>,"input_template": Json | null,"is_active": boolean,"is_schema_confirmed": boolean,"lowest_seed": number | null,"max_images": number,"operator_input": NonNullable<Json>,"outputs_path": unknown,"paid_price_credits": number,"price_credits": number,"prompt_input": string | null,"provider": string,"provider_ref": string,"required_inputs": (string)[],"requires_paid": boolean,"title": string
                  }
                  ComputedFields: never
                  Insert: {
                    "client_inputs": (string)[],"cost_unit"?: string | null,"cost_usd"?: number | null,"deadline"?: string,"default_input"?: NonNullable<Json>,"highest_seed"?: number | null,"id": string,"image_count_input"?: string | null,"image_inputs"?: (string)[],"input_schema": NonNullable<Json>,"input_template"?: Json | null,"is_active"?: boolean,"is_schema_confirmed"?: boolean,"lowest_seed"?: number | null,"max_images"?: number,"operator_input"?: NonNullable<Json>,"outputs_path"?: unknown,"paid_price_credits": number,"price_credits": number,"prompt_input"?: string | null,"provider": string,"provider_ref": string,"required_inputs"?: (string)[],"requires_paid"?: boolean,"title": string
                  }
                  Update: {
                    "client_inputs"?: (string)[],"cost_unit"?: string | null,"cost_usd"?: number | null,"deadline"?: string,"default_input"?: NonNullable<Json>,"highest_seed"?: number | null,"id"?: string,"image_count_input"?: string | null,"image_inputs"?: (string)[],"input_schema"?: NonNullable<Json>,"input_template"?: Json | null,"is_active"?: boolean,"is_schema_confirmed"?: boolean,"lowest_seed"?: number | null,"max_images"?: number,"operator_input"?: NonNullable<Json>,"outputs_path"?: unknown,"paid_price_credits"?: number,"price_credits"?: number,"prompt_input"?: string | null,"provider"?: string,"provider_ref"?: string,"required_inputs"?: (string)[],"requires_paid"?: boolean,"title"?: string
                  }
                  Relationships: [
                    
                  ]
                },"prompt_templates": {
                  Row: {
                    "created_at": string,"id": string,"model_id": string | null,"params": NonNullable<Json>,"prompt": string,"title": string,"user_id": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"model_id"?: string | null,"params"?: NonNullable<Json>,"prompt": string,"title": string,"user_id"?: string | null
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"model_id"?: string | null,"params"?: NonNullable<Json>,"prompt"?: string,"title"?: string,"user_id"?: string | null
                  }
                  Relationships: [
                    
                  ]
                }
          }
          Views: {
            [_ in never]: never
          }
          Functions: {
            "apply_billing_event":
{ Args: { "event": Json,"provider": string }; Returns: Json
                           },
"cancel_batch":
{ Args: { "batch_id": string }; Returns: Json
                           },
"cancel_generation":
{ Args: { "job_id": string }; Returns: Json
                           },
"delete_generation":
{ Args: { "job_id": string }; Returns: Json
                           },
"delete_prompt_template":
{ Args: { "id": string }; Returns: Json
                           },
"delete_webhook":
{ Args: { "webhook_id": string }; Returns: Json
                           },
"enable_webhook":
{ Args: { "webhook_id": string }; Returns: Json
                           },
"enqueue_batch":
{ Args: { "idempotency_key"?: string,"max_price_credits"?: number,"model": string,"params"?: Json,"prompts": (string)[] }; Returns: Json
                           },
"enqueue_generation":
{ Args: { "idempotency_key"?: string,"max_price_credits"?: number,"model": string,"params"?: Json,"prompt": string }; Returns: Json
                           },
"export_user":
{ Args: { "after"?: (string)[],"page_size"?: number,"user_id": string }; Returns: Json
                           },
"get_batch_status":
{ Args: { "batch_id": string }; Returns: Json
                           },
"get_entitlement":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"get_job_status":
{ Args: { "job_id": string }; Returns: Json
                           },
"grant_credits":
{ Args: { "amount": number,"expires_at"?: string,"external_id": string,"kind": string,"priority"?: number,"user_id": string }; Returns: Json
                           },
"like_image":
{ Args: { "image_position"?: number,"is_liked"?: boolean,"job_id": string }; Returns: Json
                           },
"list_active_jobs":
{ Args: { "job_ids"?: (string)[] }; Returns: Json
                           },
"list_deliveries":
{ Args: { "at_most"?: number,"state"?: string }; Returns: Json
                           },
"list_generations":
{ Args: { "before"?: string,"only_favorites"?: boolean,"page_size"?: number,"status"?: string,"tag"?: string }; Returns: Json
                           },
"list_models":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"list_prompt_templates":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"list_public_images":
{ Args: { "before"?: string,"page_size"?: number }; Returns: Json
                           },
"list_webhooks":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"merge_user":
{ Args: { "allow_permanent"?: boolean,"from_user_id": string,"to_user_id": string }; Returns: Json
                           },
"pause_model":
{ Args: { "model": string,"reason"?: string,"until"?: string }; Returns: Json
                           },
"ping":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"queue_health":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"queue_history":
{ Args: { "bucket_seconds"?: number,"since"?: string }; Returns: Json
                           },
"queue_job":
{ Args: { "job_id": string }; Returns: Json
                           },
"queue_report":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"redeliver":
{ Args: { "delivery_id": string }; Returns: Json
                           },
"redeliver_dead":
{ Args: { "webhook_id": string }; Returns: Json
                           },
"redrive_failed":
{ Args: { "at_most"?: number,"code": string,"since": string }; Returns: Json
                           },
"register_push_token":
{ Args: { "token": string }; Returns: Json
                           },
"register_webhook":
{ Args: { "description"?: string,"events"?: (string)[],"url": string }; Returns: Json
                           },
"restore_generation":
{ Args: { "job_id": string }; Returns: Json
                           },
"resume_model":
{ Args: { "model": string }; Returns: Json
                           },
"retry_generation":
{ Args: { "job_id": string,"max_price_credits"?: number }; Returns: Json
                           },
"rotate_webhook_secret":
{ Args: { "webhook_id": string }; Returns: Json
                           },
"save_prompt_template":
{ Args: { "id"?: string,"model"?: string,"params"?: Json,"prompt": string,"title": string }; Returns: Json
                           },
"set_favorite":
{ Args: { "is_favorite"?: boolean,"job_id": string }; Returns: Json
                           },
"set_paid":
{ Args: { "event_id"?: string,"happened_at"?: string,"paid_until": string,"user_id": string }; Returns: Json
                           },
"set_tags":
{ Args: { "job_id": string,"tags": (string)[] }; Returns: Json
                           },
"share_image":
{ Args: { "image_position"?: number,"is_public"?: boolean,"job_id": string,"shows_prompt"?: boolean }; Returns: Json
                           },
"unregister_push_token":
{ Args: { "token": string }; Returns: Json
                           }
          }
          Enums: {
            [_ in never]: never
          }
          CompositeTypes: {
            [_ in never]: never
          }
        }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "public">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
  ? (DefaultSchema["Tables"] & DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
      Row: infer R
    }
    ? R
    : never
  : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Insert: infer I
    }
    ? I
    : never
  : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Update: infer U
    }
    ? U
    : never
  : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never = never
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
  ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
  : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never = never
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
  ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
  : never

export const Constants = {
  "public": {
          Enums: {
            
          }
        }
} as const
