/** What a user can mend; its text is shown as it is. */
export class UserError extends Error {}
